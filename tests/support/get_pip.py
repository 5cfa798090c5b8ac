"""
Stands where ansible-test looks for its downloaded get-pip script: the same pip, setuptools and wheel,
from the Python package index alone, with the ensurepip of this Python as the first step.
"""

import ensurepip
import os
import runpy
import sys

ensurepip.bootstrap()
# ensurepip turns pip's settings off for itself and leaves them off.
del os.environ["PIP_CONFIG_FILE"]
packages = [word for word in sys.argv[1:] if word not in ("--no-setuptools", "--no-wheel")]
sys.argv = ["pip", "install", *packages]
runpy.run_module("pip", run_name="__main__", alter_sys=True)
