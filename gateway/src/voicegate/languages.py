"""Whisper's languages: the code a request gives and the name a response carries."""

from __future__ import annotations

NAMES: dict[str, str] = {
    "af": "afrikaans", "am": "amharic", "ar": "arabic", "as": "assamese", "az": "azerbaijani",
    "ba": "bashkir", "be": "belarusian", "bg": "bulgarian", "bn": "bengali", "bo": "tibetan",
    "br": "breton", "bs": "bosnian", "ca": "catalan", "cs": "czech", "cy": "welsh", "da": "danish",
    "de": "german", "el": "greek", "en": "english", "es": "spanish", "et": "estonian", "eu": "basque",
    "fa": "persian", "fi": "finnish", "fo": "faroese", "fr": "french", "gl": "galician",
    "gu": "gujarati", "ha": "hausa", "haw": "hawaiian", "he": "hebrew", "hi": "hindi",
    "hr": "croatian", "ht": "haitian creole", "hu": "hungarian", "hy": "armenian", "id": "indonesian",
    "is": "icelandic", "it": "italian", "ja": "japanese", "jw": "javanese", "ka": "georgian",
    "kk": "kazakh", "km": "khmer", "kn": "kannada", "ko": "korean", "la": "latin",
    "lb": "luxembourgish", "ln": "lingala", "lo": "lao", "lt": "lithuanian", "lv": "latvian",
    "mg": "malagasy", "mi": "maori", "mk": "macedonian", "ml": "malayalam", "mn": "mongolian",
    "mr": "marathi", "ms": "malay", "mt": "maltese", "my": "myanmar", "ne": "nepali", "nl": "dutch",
    "nn": "nynorsk", "no": "norwegian", "oc": "occitan", "pa": "punjabi", "pl": "polish",
    "ps": "pashto", "pt": "portuguese", "ro": "romanian", "ru": "russian", "sa": "sanskrit",
    "sd": "sindhi", "si": "sinhala", "sk": "slovak", "sl": "slovenian", "sn": "shona", "so": "somali",
    "sq": "albanian", "sr": "serbian", "su": "sundanese", "sv": "swedish", "sw": "swahili",
    "ta": "tamil", "te": "telugu", "tg": "tajik", "th": "thai", "tk": "turkmen", "tl": "tagalog",
    "tr": "turkish", "tt": "tatar", "uk": "ukrainian", "ur": "urdu", "uz": "uzbek",
    "vi": "vietnamese", "yi": "yiddish", "yo": "yoruba", "yue": "cantonese", "zh": "chinese",
}  # fmt: skip

# Other names people and clients use for the same languages.
_OTHER: dict[str, str] = {
    "burmese": "my", "castilian": "es", "farsi": "fa", "filipino": "tl", "flemish": "nl",
    "haitian": "ht", "jv": "jw", "letzeburgesch": "lb", "mandarin": "zh", "moldavian": "ro",
    "moldovan": "ro", "nb": "no", "panjabi": "pa", "pushto": "ps", "sinhalese": "si",
    "valencian": "ca", "iw": "he", "deu": "de", "ger": "de", "eng": "en", "fra": "fr", "fre": "fr",
    "ita": "it", "spa": "es", "por": "pt", "nld": "nl", "dut": "nl", "jpn": "ja", "zho": "zh",
    "chi": "zh", "rus": "ru", "pol": "pl", "ukr": "uk", "tur": "tr", "kor": "ko", "ara": "ar",
}  # fmt: skip

_BY_NAME: dict[str, str] = {name: code for code, name in NAMES.items()} | _OTHER


def code_of(text: str) -> str | None:
    """The code for `de`, `DE`, `de-CH`, `German` or `ger`; None for what Whisper does not know."""
    word = text.strip().casefold()
    if word in NAMES:
        return word
    if word in _BY_NAME:
        return _BY_NAME[word]
    base = word.replace("_", "-").split("-", 1)[0]
    if base != word and base in NAMES:
        return base
    return None


def name_of(code: str | None) -> str:
    """`german` for `de`: the form verbose_json carries. Empty when there was no speech to judge by."""
    return NAMES.get(code, code) if code else ""
