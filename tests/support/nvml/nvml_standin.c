/* A stand-in for libnvidia-ml.so.1 for machines without a card: the symbols and struct layouts of NVML,
 * with numbers from the text file that SOTTOVOCE_NVML_STANDIN names. The file is read at nvmlInit.
 *
 *   driver 570.86.15            version of the driver
 *   cuda 12080                  CUDA version as NVML counts it
 *   init 9                      nvmlInit fails with this nvmlReturn_t
 *   card                        begins a card; what follows is of it
 *   uuid, name, pci 0000:01:00.0, capability 8.6
 *   memory TOTAL RESERVED USED  in MiB
 *   temperature 41
 *   reasons 0x1                 mask of the clock event reasons
 *   ecc CORRECTED UNCORRECTED   without this line the card has no ECC
 *   process PID MIB compute|graphics [GPU INSTANCE]     MIB -1: not told
 *   hidden                      the lists of processes are empty, as in an unprivileged container
 *   fail SYMBOL CODE            this call fails for this card
 *   lost SYMBOL                 from this call on, every call for this card fails with 15 (GPU is lost)
 *   mig UUID INSTANCE TOTAL RESERVED USED               a slice; the card is then in MIG mode
 *
 * Built with -DOLD_DRIVER it lacks what drivers before 2020 lack.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int ret_t;
enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, LOST = 15 };
enum { MAX_CARDS = 8, MAX_PROCESSES = 512, MAX_FAILS = 16, MAX_MIG = 8 };
static const unsigned long long MIB = 1024ull * 1024ull;

struct process { unsigned pid; long long mib; int graphics; unsigned instance; };
struct fail { char symbol[80]; int code; };
struct card; /* a MIG slice is a card with a parent */
struct card {
  struct card *parent;
  char uuid[96], name[96];
  unsigned domain, bus, device, temperature, instance;
  int major, minor, has_ecc, hidden, is_lost, fails, processes, migs;
  unsigned long long total, reserved, used, reasons, ecc[2];
  struct process process[MAX_PROCESSES];
  struct fail fail[MAX_FAILS];
  char lost[80];
  struct card *mig[MAX_MIG];
};
typedef struct card *handle_t;

static struct card *cards;
static int count, users, init_code, cuda;
static char driver[80];

static struct card slices[MAX_CARDS * MAX_MIG];
static int sliced;

static int read_line(char *line) {
  char word[64], a[96], b[96];
  unsigned long long t, r, u;
  struct card *card = count ? &cards[count - 1] : NULL;
  if (sscanf(line, "%63s", word) != 1 || word[0] == '#') return 1;
  char *rest = line + strspn(line, " \t") + strlen(word);
  rest += strspn(rest, " \t");
  rest[strcspn(rest, "\r\n")] = 0;
  if (!strcmp(word, "driver")) return snprintf(driver, sizeof driver, "%s", rest) > 0;
  if (!strcmp(word, "cuda")) return sscanf(rest, "%d", &cuda) == 1;
  if (!strcmp(word, "init")) return sscanf(rest, "%d", &init_code) == 1;
  if (!strcmp(word, "card")) return count < MAX_CARDS && ++count;
  if (!card) return 0;
  if (!strcmp(word, "uuid")) return snprintf(card->uuid, sizeof card->uuid, "%s", rest) > 0;
  if (!strcmp(word, "name")) return snprintf(card->name, sizeof card->name, "%s", rest) > 0;
  if (!strcmp(word, "pci")) return sscanf(rest, "%x:%x:%x.0", &card->domain, &card->bus, &card->device) == 3;
  if (!strcmp(word, "capability")) return sscanf(rest, "%d.%d", &card->major, &card->minor) == 2;
  if (!strcmp(word, "temperature")) return sscanf(rest, "%u", &card->temperature) == 1;
  if (!strcmp(word, "reasons")) return sscanf(rest, "%llx", &card->reasons) == 1;
  if (!strcmp(word, "hidden")) return card->hidden = 1;
  if (!strcmp(word, "ecc"))
    return card->has_ecc = sscanf(rest, "%llu %llu", &card->ecc[0], &card->ecc[1]) == 2;
  if (!strcmp(word, "lost")) return snprintf(card->lost, sizeof card->lost, "%s", rest) > 0;
  if (!strcmp(word, "memory")) {
    if (sscanf(rest, "%llu %llu %llu", &t, &r, &u) != 3) return 0;
    card->total = t * MIB, card->reserved = r * MIB, card->used = u * MIB;
    return 1;
  }
  if (!strcmp(word, "fail")) {
    struct fail *fail = &card->fail[card->fails];
    return card->fails < MAX_FAILS && sscanf(rest, "%79s %d", fail->symbol, &fail->code) == 2 && ++card->fails;
  }
  if (!strcmp(word, "process")) {
    struct process *p = &card->process[card->processes];
    if (card->processes >= MAX_PROCESSES) return 0;
    p->instance = ~0u;
    if (sscanf(rest, "%u %lld %95s %u", &p->pid, &p->mib, a, &p->instance) < 3) return 0;
    p->graphics = !strcmp(a, "graphics");
    return ++card->processes;
  }
  if (!strcmp(word, "mig")) {
    struct card *mig = &slices[sliced];
    if (card->migs >= MAX_MIG) return 0;
    if (sscanf(rest, "%95s %95s %llu %llu %llu", mig->uuid, b, &t, &r, &u) != 5) return 0;
    mig->parent = card, mig->instance = (unsigned)atoi(b);
    mig->total = t * MIB, mig->reserved = r * MIB, mig->used = u * MIB;
    snprintf(mig->name, sizeof mig->name, "%.80s MIG", card->name);
    card->mig[card->migs++] = mig;
    return ++sliced;
  }
  return 0;
}

static ret_t start(void) {
  const char *path = getenv("SOTTOVOCE_NVML_STANDIN");
  FILE *file = path ? fopen(path, "r") : NULL;
  char line[512];
  int number = 0;
  if (!file) {
    fprintf(stderr, "nvml stand-in: SOTTOVOCE_NVML_STANDIN names no readable file\n");
    return 999;
  }
  free(cards);
  cards = calloc(MAX_CARDS, sizeof *cards);
  memset(slices, 0, sizeof slices);
  count = init_code = sliced = 0;
  while (fgets(line, sizeof line, file)) {
    number++;
    if (!read_line(line)) {
      fprintf(stderr, "nvml stand-in: %s:%d is not understood: %s\n", path, number, line);
      fclose(file);
      return 999;
    }
  }
  fclose(file);
  if (init_code) return init_code;
  users++;
  return OK;
}

/* What every call for a card begins with. */
static ret_t enter(struct card *card, const char *symbol) {
  if (!users) return UNINITIALIZED;
  if (!card) return INVALID;
  struct card *whole = card->parent ? card->parent : card;
  if (whole->lost[0] && !strcmp(whole->lost, symbol)) whole->is_lost = 1;
  if (whole->is_lost) return LOST;
  for (int i = 0; i < card->fails; i++)
    if (!strcmp(card->fail[i].symbol, symbol)) return card->fail[i].code;
  return OK;
}
#define ENTER(card) do { ret_t code_ = enter(card, __func__); if (code_) return code_; } while (0)

static ret_t put(char *into, unsigned length, const char *text) {
  if (strlen(text) + 1 > length) return TOO_SMALL;
  strcpy(into, text);
  return OK;
}

ret_t nvmlInit(void) { return start(); }
ret_t nvmlShutdown(void) { if (!users) return UNINITIALIZED; users--; return OK; }
const char *nvmlErrorString(ret_t code) { return code == LOST ? "GPU is lost" : code ? "Error" : "Success"; }
ret_t nvmlSystemGetDriverVersion(char *text, unsigned length) {
  return users ? put(text, length, driver) : UNINITIALIZED;
}
ret_t nvmlSystemGetCudaDriverVersion(int *version) { *version = cuda; return users ? OK : UNINITIALIZED; }
ret_t nvmlDeviceGetCount(unsigned *number) { *number = (unsigned)count; return users ? OK : UNINITIALIZED; }

ret_t nvmlDeviceGetHandleByIndex(unsigned index, handle_t *card) {
  if (index >= (unsigned)count) return users ? INVALID : UNINITIALIZED;
  ENTER(&cards[index]);
  *card = &cards[index];
  return OK;
}
ret_t nvmlDeviceGetUUID(handle_t card, char *text, unsigned length) {
  ENTER(card);
  return put(text, length, card->uuid);
}
ret_t nvmlDeviceGetName(handle_t card, char *text, unsigned length) {
  ENTER(card);
  return put(text, length, card->name);
}
struct pci_v2 { char old[16]; unsigned domain, bus, device, id, subsystem, reserved[4]; };
struct pci_v3 { char old[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; };

ret_t nvmlDeviceGetPciInfo(handle_t card, struct pci_v2 *pci) {
  ENTER(card);
  memset(pci, 0, sizeof *pci);
  pci->domain = card->domain, pci->bus = card->bus, pci->device = card->device;
  return OK;
}
struct memory { unsigned long long total, free, used; };

ret_t nvmlDeviceGetMemoryInfo(handle_t card, struct memory *memory) {
  ENTER(card);
  memory->total = card->total;
  memory->used = card->used + card->reserved;
  memory->free = card->total - memory->used;
  return OK;
}
ret_t nvmlDeviceGetTemperature(handle_t card, unsigned sensor, unsigned *degrees) {
  ENTER(card);
  if (card->parent) return NOT_SUPPORTED;
  *degrees = card->temperature;
  return sensor ? INVALID : OK;
}
ret_t nvmlDeviceGetCurrentClocksThrottleReasons(handle_t card, unsigned long long *mask) {
  ENTER(card);
  *mask = card->reasons;
  return OK;
}
ret_t nvmlDeviceGetTotalEccErrors(handle_t card, unsigned kind, unsigned counter, unsigned long long *number) {
  ENTER(card);
  if (!card->has_ecc) return NOT_SUPPORTED;
  if (kind > 1 || counter > 1) return INVALID;
  *number = card->ecc[kind];
  return OK;
}
ret_t nvmlDeviceGetCudaComputeCapability(handle_t card, int *major, int *minor) {
  ENTER(card);
  *major = card->major, *minor = card->minor;
  return OK;
}

struct info_v1 { unsigned pid; unsigned long long used; };
struct info_v2 { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; };

static ret_t list(handle_t card, int graphics, int newer, unsigned *room, void *into) {
  unsigned found = 0;
  for (int i = 0; i < card->processes && !card->hidden; i++) {
    struct process *p = &card->process[i];
    unsigned long long used = p->mib < 0 ? ~0ull : (unsigned long long)p->mib * MIB;
    if (p->graphics != graphics) continue;
    if (found < *room && into) {
      if (newer) ((struct info_v2 *)into)[found] = (struct info_v2){p->pid, used, p->instance, ~0u};
      else ((struct info_v1 *)into)[found] = (struct info_v1){p->pid, used};
    }
    found++;
  }
  int fits = found <= *room;
  *room = found;
  return fits ? OK : TOO_SMALL;
}
#define LIST(symbol, graphics, newer) \
  ret_t symbol(handle_t card, unsigned *room, void *into) { ENTER(card); return list(card, graphics, newer, room, into); }
LIST(nvmlDeviceGetComputeRunningProcesses, 0, 0)
LIST(nvmlDeviceGetGraphicsRunningProcesses, 1, 0)

#ifndef OLD_DRIVER
ret_t nvmlInit_v2(void) { return start(); }
ret_t nvmlInitWithFlags(unsigned flags) { (void)flags; return start(); }
ret_t nvmlSystemGetCudaDriverVersion_v2(int *version) { return nvmlSystemGetCudaDriverVersion(version); }
ret_t nvmlDeviceGetCount_v2(unsigned *number) { return nvmlDeviceGetCount(number); }
ret_t nvmlDeviceGetHandleByIndex_v2(unsigned index, handle_t *card) {
  return nvmlDeviceGetHandleByIndex(index, card);
}
ret_t nvmlDeviceGetPciInfo_v3(handle_t card, struct pci_v3 *pci) {
  ENTER(card);
  memset(pci, 0, sizeof *pci);
  pci->domain = card->domain, pci->bus = card->bus, pci->device = card->device;
  snprintf(pci->bus_id, sizeof pci->bus_id, "%08X:%02X:%02X.0", card->domain, card->bus, card->device);
  snprintf(pci->old, sizeof pci->old, "%04X:%02X:%02X.0", card->domain & 0xffff, card->bus & 0xff,
           card->device & 0xff);
  return OK;
}
struct memory_v2 { unsigned version; unsigned long long total, reserved, free, used; };

ret_t nvmlDeviceGetMemoryInfo_v2(handle_t card, struct memory_v2 *memory) {
  ENTER(card);
  if (memory->version != (sizeof *memory | 2u << 24)) return 25;
  memory->total = card->total, memory->reserved = card->reserved, memory->used = card->used;
  memory->free = card->total - card->reserved - card->used;
  return OK;
}
ret_t nvmlDeviceGetCurrentClocksEventReasons(handle_t card, unsigned long long *mask) {
  ENTER(card);
  *mask = card->reasons;
  return OK;
}
LIST(nvmlDeviceGetComputeRunningProcesses_v3, 0, 1)
LIST(nvmlDeviceGetGraphicsRunningProcesses_v3, 1, 1)

ret_t nvmlDeviceGetMigMode(handle_t card, unsigned *current, unsigned *pending) {
  ENTER(card);
  if (card->parent) return INVALID;
  *current = *pending = card->migs > 0;
  return OK;
}
ret_t nvmlDeviceGetMaxMigDeviceCount(handle_t card, unsigned *number) {
  ENTER(card);
  *number = card->migs ? MAX_MIG - 1 : 0;
  return OK;
}
ret_t nvmlDeviceGetMigDeviceHandleByIndex(handle_t card, unsigned index, handle_t *mig) {
  ENTER(card);
  if (index >= (unsigned)card->migs) return NOT_FOUND;
  *mig = card->mig[index];
  return OK;
}
ret_t nvmlDeviceGetGpuInstanceId(handle_t card, unsigned *instance) {
  ENTER(card);
  *instance = card->instance;
  return card->parent ? OK : INVALID;
}
#endif
