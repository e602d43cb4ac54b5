// Runs compiled Metal kernels: GPU threads are fibers on one OS thread, one threadgroup
// at a time. In checked mode the compiler's memory hooks come here too, and every access
// is looked up in the memory that a kernel may touch and compared with earlier ones.
#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

namespace {

constexpr unsigned SIMD = 32;
constexpr unsigned MAX_THREADS = 1024;
constexpr size_t STACK_BYTES = 64 << 10;
constexpr unsigned MAX_FINDINGS = 32;
constexpr unsigned SLOT_BYTES = 16;

struct Ids {
  uint32_t position[3], in_group[3], group[3], group_size[3], grid[3], n_groups[3];
  uint32_t index, lane, simdgroup, n_simdgroups;
};

enum Kind : uint32_t {
  RACE, UNINITIALISED, OUT_OF_BOUNDS, MISALIGNED, DIVERGENT_BARRIER, SIGNAL, DIVERGED_SIMD,
};
enum Space : uint32_t { DEVICE, THREADGROUP, STACK, NOWHERE };

// What Python reads back; pc 0 means unknown.
struct Finding {
  uint32_t kind, space, region, thread, other_thread, size, is_write, other_is_write;
  uint64_t pc, other_pc, offset, extra;
};

struct Region {
  uint64_t begin, size;
  uint32_t initialised;
  uint32_t pad;
};

typedef void (*Entry)(const uint64_t*, const Ids*);

struct Request {
  Entry entry;
  const uint64_t* buffers;
  const Region* device;
  uint64_t n_device;
  const Region* shared;
  uint64_t n_shared;
  uint32_t grid[3], group[3];
  uint64_t seed;
  uint32_t checked, pad;
  uint64_t code_begin, code_end;
  Finding* findings;
};

// Memory that only grows. No standard C++ library is linked: building one would cost the
// first user two minutes.
template <typename T>
struct Array {
  T* data;
  size_t n, room;
  T& operator[](size_t i) { return data[i]; }
  void resize(size_t wanted) {
    if (wanted > room) {
      data = static_cast<T*>(realloc(data, wanted * sizeof(T)));
      if (!data) abort();
      memset(static_cast<void*>(data + room), 0, (wanted - room) * sizeof(T));
      room = wanted;
    }
    n = wanted;
  }
};

enum State : uint8_t { READY, IN_EXCHANGE, IN_SIMD_BARRIER, IN_BARRIER, DONE };

struct Fiber {
  void* sp;
  State state;
  uint64_t site, pc;
  uint32_t flags;
  Ids ids;
};

struct Simdgroup {
  // Two buffers: one is read while the next exchange is deposited.
  alignas(16) unsigned char slots[2][SIMD * SLOT_BYTES];
  uint32_t mask[2];
  unsigned turn;
  uint32_t epoch;
};

// Who touched a byte last. Epochs count barriers since the threadgroup began.
struct Touch {
  uint32_t group;
  uint16_t thread;
  uint8_t set, atomic;
  uint32_t epoch, simd_epoch;
  uint64_t pc;
};
struct Shadow {
  Touch write, read;
  uint8_t initialised;
};

Fiber fibers[MAX_THREADS];
Simdgroup simdgroups[MAX_THREADS / SIMD];
char* stacks;
Fiber* current;
void* scheduler_sp;
const Request* request;
unsigned n_threads, n_findings;
uint32_t group_number, epoch_device, epoch_shared;
bool checking, stopping;
Array<Array<Shadow>> device_shadow, shared_shadow;
Array<unsigned> groups, order;
sigjmp_buf escape;
volatile sig_atomic_t running;

extern "C" void msl_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.type msl_switch, @function
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#elif defined(__aarch64__)
asm(R"(
.text
.type msl_switch, %function
msl_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "expected x86-64 or aarch64"
#endif

void yield() { msl_switch(&current->sp, scheduler_sp); }

void body() {
  request->entry(request->buffers, &current->ids);
  current->state = DONE;
  yield();
  __builtin_trap();
}

void prepare(Fiber& fiber, unsigned i) {
  char* top = stacks + (i + 1) * STACK_BYTES;
#if defined(__x86_64__)
  // As after a call: the stack is 8 bytes off a multiple of 16.
  void** sp = reinterpret_cast<void**>(top) - 2;
  *sp = reinterpret_cast<void*>(&body);
  fiber.sp = sp - 6;
#else
  void** sp = reinterpret_cast<void**>(top - 160);
  memset(sp, 0, 160);
  sp[11] = reinterpret_cast<void*>(&body);
  fiber.sp = sp;
#endif
  fiber.state = READY;
}

Finding* report(Kind kind, uint64_t pc) {
  for (unsigned i = 0; i < n_findings; ++i) {
    const Finding& f = request->findings[i];
    if (f.kind == kind && f.pc == pc) return nullptr;
  }
  if (n_findings == MAX_FINDINGS) return nullptr;
  Finding* f = &request->findings[n_findings++];
  memset(f, 0, sizeof *f);
  f->kind = kind;
  f->pc = pc;
  f->space = NOWHERE;
  f->thread = current ? current->ids.index : 0;
  return f;
}

uint64_t next_random(uint64_t& state) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

void number(Array<unsigned>& array, size_t n, bool shuffled, uint64_t& state) {
  array.resize(n);
  for (size_t i = 0; i < n; ++i) array[i] = i;
  for (size_t i = shuffled ? n : 0; i > 1; --i) {
    size_t j = next_random(state) % i;
    unsigned other = array[j];
    array[j] = array[i - 1];
    array[i - 1] = other;
  }
}

void begin_shadow(Array<Shadow>& shadow, size_t n, bool initialised) {
  shadow.resize(n);
  memset(static_cast<void*>(shadow.data), 0, n * sizeof(Shadow));
  for (size_t i = 0; initialised && i < n; ++i) shadow[i].initialised = 1;
}

// Let lanes that wait at the lowest of their sites go on together.
bool release_simdgroup(unsigned s, unsigned first, unsigned last) {
  uint64_t lowest = UINT64_MAX;
  for (unsigned i = first; i < last; ++i) {
    Fiber& f = fibers[i];
    if (f.state == IN_EXCHANGE || f.state == IN_SIMD_BARRIER) {
      if (f.site < lowest) lowest = f.site;
    }
  }
  if (lowest == UINT64_MAX) return false;
  Simdgroup& group = simdgroups[s];
  uint32_t mask = 0, others = 0;
  State kind = DONE;
  for (unsigned i = first; i < last; ++i) {
    Fiber& f = fibers[i];
    bool waits = f.state == IN_EXCHANGE || f.state == IN_SIMD_BARRIER;
    if (waits && f.site == lowest) {
      kind = f.state;
      mask |= 1u << (i - first);
      f.state = READY;
    } else if (f.state != DONE) {
      others |= 1u << (i - first);
    }
  }
  if (kind == IN_EXCHANGE) {
    group.mask[group.turn & 1] = mask;
    ++group.turn;
  } else {
    ++group.epoch;
    if (others && checking) {
      current = &fibers[first + __builtin_ctz(mask)];
      if (Finding* f = report(DIVERGENT_BARRIER, current->pc)) {
        f->offset = lowest;
        f->extra = __builtin_popcount(mask);
        f->size = last - first;
      }
    }
  }
  return true;
}

// All live threads must have come to the same barrier.
bool release_barrier() {
  unsigned arrived = 0, done = 0;
  uint64_t site = 0, pc = 0;
  bool same = true;
  uint32_t flags = 0;
  for (unsigned i = 0; i < n_threads; ++i) {
    Fiber& f = fibers[i];
    if (f.state == DONE) {
      ++done;
    } else if (f.state == IN_BARRIER) {
      if (arrived == 0) {
        site = f.site;
        pc = f.pc;
        current = &f;
      }
      same = same && f.site == site;
      flags = f.flags;
      ++arrived;
    }
  }
  if (arrived == 0) return false;
  if (done || !same) {
    if (Finding* f = report(DIVERGENT_BARRIER, pc)) {
      f->offset = site;
      f->extra = arrived;
      f->size = n_threads;
    }
    stopping = true;
    return false;
  }
  if (flags & 1) ++epoch_device;
  if (flags & 2) ++epoch_shared;
  for (unsigned i = 0; i < n_threads; ++i) fibers[i].state = READY;
  return true;
}

void run_group() {
  unsigned n_simdgroups = (n_threads + SIMD - 1) / SIMD;
  for (unsigned s = 0; s < n_simdgroups; ++s) {
    simdgroups[s].turn = 0;
    simdgroups[s].epoch = 0;
  }
  epoch_device = epoch_shared = 0;
  while (!stopping) {
    bool ran = false;
    for (size_t at = 0; at < order.n; ++at) {
      unsigned i = order[at];
      if (fibers[i].state != READY) continue;
      ran = true;
      current = &fibers[i];
      msl_switch(&scheduler_sp, current->sp);
    }
    bool released = false;
    for (unsigned s = 0; s < n_simdgroups; ++s) {
      unsigned last = (s + 1) * SIMD < n_threads ? (s + 1) * SIMD : n_threads;
      released = release_simdgroup(s, s * SIMD, last) || released;
    }
    if (!released && !ran && !release_barrier()) return;
    if (!released && ran) continue;
  }
}

// Faults become findings.
struct sigaction old_segv, old_bus, old_fpe, old_ill;

void on_signal(int number, siginfo_t* info, void* context) {
  uint64_t pc = 0;
  auto* registers = static_cast<ucontext_t*>(context);
#if defined(__x86_64__)
  pc = registers->uc_mcontext.gregs[REG_RIP];
#elif defined(__aarch64__)
  pc = registers->uc_mcontext.pc;
#endif
  if (!running) {
    struct sigaction plain = {};
    plain.sa_handler = SIG_DFL;
    sigaction(number, &plain, nullptr);
    return;
  }
  if (Finding* f = report(SIGNAL, pc + 1)) {
    f->extra = number;
    f->offset = reinterpret_cast<uint64_t>(info->si_addr);
    for (uint64_t i = 0; i < request->n_device; ++i) {
      const Region& r = request->device[i];
      if (f->offset + 65536 >= r.begin && f->offset < r.begin + r.size + (1 << 20)) {
        if (f->space != DEVICE || f->offset >= r.begin) {
          f->space = DEVICE;
          f->region = i;
          f->size = 0;
        }
      }
    }
    if (f->space == DEVICE) f->offset -= request->device[f->region].begin;
  }
  siglongjmp(escape, 1);
}

// The alternate stack belongs to the calling thread, which gets its own back afterwards.
void catch_signals(bool on) {
  static char memory[1 << 16];
  static stack_t old_stack;
  stack_t alternate = {};
  alternate.ss_sp = memory;
  alternate.ss_size = sizeof memory;
  sigaltstack(on ? &alternate : &old_stack, on ? &old_stack : nullptr);
  int numbers[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
  struct sigaction* saved[] = {&old_segv, &old_bus, &old_fpe, &old_ill};
  for (int i = 0; i < 4; ++i) {
    if (on) {
      struct sigaction action = {};
      action.sa_sigaction = on_signal;
      action.sa_flags = SA_SIGINFO | SA_ONSTACK;
      sigaction(numbers[i], &action, saved[i]);
    } else {
      sigaction(numbers[i], saved[i], nullptr);
    }
  }
}

void fill_shared() {
  for (uint64_t i = 0; i < request->n_shared; ++i) {
    const Region& r = request->shared[i];
    memset(reinterpret_cast<void*>(r.begin), 0xff, r.size);
    if (checking) begin_shadow(shared_shadow[i], r.size, false);
  }
}

void run_grid() {
  const uint32_t *grid = request->grid, *group = request->group;
  uint32_t n[3];
  for (int d = 0; d < 3; ++d) n[d] = (grid[d] + group[d] - 1) / group[d];
  uint64_t state = request->seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
  number(groups, size_t(n[0]) * n[1] * n[2], request->seed != 0, state);
  order.n = 0;
  for (size_t g = 0; g < groups.n; ++g) {
    if (stopping) return;
    unsigned at = groups[g];
    group_number = at + 1;
    uint32_t where[3] = {at % n[0], at / n[0] % n[1], at / n[0] / n[1]}, size[3];
    for (int d = 0; d < 3; ++d) {
      uint32_t left = grid[d] - where[d] * group[d];
      size[d] = left < group[d] ? left : group[d];
    }
    n_threads = size[0] * size[1] * size[2];
    if (order.n != n_threads || request->seed) {
      number(order, n_threads, request->seed != 0, state);
    }
    fill_shared();
    for (unsigned i = 0; i < n_threads; ++i) {
      Fiber& f = fibers[i];
      uint32_t inside[3] = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
      for (int d = 0; d < 3; ++d) {
        f.ids.in_group[d] = inside[d];
        f.ids.group[d] = where[d];
        f.ids.position[d] = where[d] * group[d] + inside[d];
        f.ids.group_size[d] = size[d];
        f.ids.grid[d] = grid[d];
        f.ids.n_groups[d] = n[d];
      }
      f.ids.index = i;
      f.ids.lane = i % SIMD;
      f.ids.simdgroup = i / SIMD;
      f.ids.n_simdgroups = (n_threads + SIMD - 1) / SIMD;
      prepare(f, i);
    }
    run_group();
  }
}

// Checked mode.
bool ordered(const Touch& before, Space space) {
  if (before.group != group_number) return space != DEVICE;
  if (before.thread == current->ids.index) return true;
  uint32_t epoch = space == DEVICE ? epoch_device : epoch_shared;
  if (before.epoch != epoch) return true;
  bool same_simdgroup = before.thread / SIMD == current->ids.index / SIMD;
  return same_simdgroup && before.simd_epoch != simdgroups[current->ids.simdgroup].epoch;
}

void fill(Finding* f, Space space, uint32_t region, uint64_t offset, unsigned size,
          bool is_write, const Touch* other, bool other_is_write) {
  f->space = space;
  f->region = region;
  f->offset = offset;
  f->size = size;
  f->is_write = is_write;
  if (other) {
    f->other_thread = other->thread;
    f->other_pc = other->pc;
    f->other_is_write = other_is_write;
    f->extra = other->group != group_number;
  }
}

void touch(Array<Shadow>& shadow, Space space, uint32_t region, uint64_t offset,
           unsigned size, bool is_write, bool is_atomic, uint64_t pc) {
  Touch now = {group_number,
               static_cast<uint16_t>(current->ids.index),
               1,
               is_atomic,
               space == DEVICE ? epoch_device : epoch_shared,
               simdgroups[current->ids.simdgroup].epoch,
               pc};
  for (unsigned i = 0; i < size; ++i) {
    Shadow& s = shadow[offset + i];
    if (!is_write && !s.initialised) {
      if (Finding* f = report(UNINITIALISED, pc)) {
        fill(f, space, region, offset + i, size, is_write, nullptr, false);
      }
    }
    if (s.write.set && !(is_atomic && s.write.atomic) && !ordered(s.write, space)) {
      if (Finding* f = report(RACE, pc)) {
        fill(f, space, region, offset + i, size, is_write, &s.write, true);
      }
    }
    if (is_write && s.read.set && !(is_atomic && s.read.atomic) && !ordered(s.read, space)) {
      if (Finding* f = report(RACE, pc)) {
        fill(f, space, region, offset + i, size, is_write, &s.read, false);
      }
    }
    if (is_write) {
      s.write = now;
      s.initialised = 1;
      s.read.set = 0;
    } else {
      // Keep a reader of another thread than the writer: that is who races later.
      s.read = now;
    }
  }
}

// `alignment` is what the code relies on: packed vectors rely on none that is told here.
void access(uint64_t at, unsigned size, bool is_write, bool is_atomic, uint64_t pc,
            unsigned alignment = 1) {
  if (!checking || !current || stopping) return;
  for (uint64_t i = 0; i < request->n_device; ++i) {
    const Region& r = request->device[i];
    if (at >= r.begin && at + size <= r.begin + r.size) {
      if (at % alignment) {
        if (Finding* f = report(MISALIGNED, pc)) {
          fill(f, DEVICE, i, at - r.begin, size, is_write, nullptr, false);
        }
      }
      touch(device_shadow[i], DEVICE, i, at - r.begin, size, is_write, is_atomic, pc);
      return;
    }
  }
  for (uint64_t i = 0; i < request->n_shared; ++i) {
    const Region& r = request->shared[i];
    if (at >= r.begin && at + size <= r.begin + r.size) {
      touch(shared_shadow[i], THREADGROUP, i, at - r.begin, size, is_write, is_atomic, pc);
      return;
    }
  }
  uint64_t own = reinterpret_cast<uint64_t>(stacks) + current->ids.index * STACK_BYTES;
  if (at >= own && at + size <= own + STACK_BYTES) return;
  bool is_exchange = at >= reinterpret_cast<uint64_t>(simdgroups) &&
                     at < reinterpret_cast<uint64_t>(simdgroups + MAX_THREADS / SIMD);
  bool is_ids = at >= reinterpret_cast<uint64_t>(fibers) &&
                at < reinterpret_cast<uint64_t>(fibers + MAX_THREADS);
  bool is_arguments = at >= reinterpret_cast<uint64_t>(request->buffers) &&
                      at < reinterpret_cast<uint64_t>(request->buffers + request->n_device);
  if (is_exchange || is_ids || is_arguments) return;
  if (!is_write && at >= request->code_begin && at + size <= request->code_end) return;
  Finding* f = report(OUT_OF_BOUNDS, pc);
  if (f) {
    // Name the nearest memory that the access may have been meant for.
    uint64_t best = UINT64_MAX;
    auto consider = [&](Space space, uint64_t i, const Region& r) {
      uint64_t distance = at < r.begin ? r.begin - at : at - r.begin - r.size + 1;
      if (distance < best) {
        best = distance;
        fill(f, space, i, at - r.begin, size, is_write, nullptr, false);
      }
    };
    for (uint64_t i = 0; i < request->n_device; ++i) consider(DEVICE, i, request->device[i]);
    for (uint64_t i = 0; i < request->n_shared; ++i) {
      consider(THREADGROUP, i, request->shared[i]);
    }
    if (best > (1 << 20)) f->space = NOWHERE;
  }
  stopping = true;
  yield();
}

}  // namespace

extern "C" {

struct Exchanged {
  unsigned mask;
  const unsigned char* slots;
};

unsigned __msl_lane() { return current->ids.lane; }

Exchanged __msl_exchange(const void* value, unsigned size, unsigned long site) {
  Simdgroup& group = simdgroups[current->ids.simdgroup];
  unsigned turn = group.turn & 1;
  memcpy(group.slots[turn] + SLOT_BYTES * current->ids.lane, value, size);
  current->state = IN_EXCHANGE;
  current->site = site;
  current->pc = reinterpret_cast<uint64_t>(__builtin_return_address(0));
  yield();
  return {group.mask[turn], group.slots[turn]};
}

void __msl_barrier(unsigned flags, unsigned long site) {
  current->state = IN_BARRIER;
  current->site = site;
  current->flags = flags;
  current->pc = reinterpret_cast<uint64_t>(__builtin_return_address(0));
  yield();
}

void __msl_simd_barrier(unsigned flags, unsigned long site) {
  // 8: only to come together, as the matrix loads do; memory is not ordered by it.
  if (flags == 8) {
    char nothing = 0;
    __msl_exchange(&nothing, 1, site);
    return;
  }
  current->state = IN_SIMD_BARRIER;
  current->site = site;
  current->flags = flags;
  current->pc = reinterpret_cast<uint64_t>(__builtin_return_address(0));
  yield();
}

unsigned msl_run(const Request* what) {
  if (!stacks) {
    void* memory = mmap(nullptr, MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return UINT32_MAX;
    stacks = static_cast<char*>(memory);
  }
  request = what;
  n_findings = 0;
  stopping = false;
  checking = what->checked;
  current = nullptr;
  if (checking) {
    device_shadow.resize(what->n_device);
    for (uint64_t i = 0; i < what->n_device; ++i) {
      const Region& r = what->device[i];
      begin_shadow(device_shadow[i], r.size, r.initialised);
    }
    shared_shadow.resize(what->n_shared);
  }
  catch_signals(true);
  running = 1;
  if (sigsetjmp(escape, 1) == 0) run_grid();
  running = 0;
  catch_signals(false);
  current = nullptr;
  return n_findings;
}

#define PC reinterpret_cast<uint64_t>(__builtin_return_address(0))
#define HOOKS(n) \
  void __tsan_read##n(void* p) { access((uint64_t)p, n, false, false, PC, n); } \
  void __tsan_write##n(void* p) { access((uint64_t)p, n, true, false, PC, n); } \
  void __tsan_unaligned_read##n(void* p) { access((uint64_t)p, n, false, false, PC); } \
  void __tsan_unaligned_write##n(void* p) { access((uint64_t)p, n, true, false, PC); } \
  void __tsan_read_write##n(void* p) { \
    access((uint64_t)p, n, false, false, PC, n); \
    access((uint64_t)p, n, true, false, PC, n); \
  } \
  void __tsan_unaligned_read_write##n(void* p) { \
    access((uint64_t)p, n, false, false, PC); \
    access((uint64_t)p, n, true, false, PC); \
  } \
  void __tsan_volatile_read##n(void* p) { access((uint64_t)p, n, false, false, PC, n); } \
  void __tsan_volatile_write##n(void* p) { access((uint64_t)p, n, true, false, PC, n); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t n) {
  for (size_t i = 0; i < n; ++i) access((uint64_t)p + i, 1, false, false, PC);
}
void __tsan_write_range(void* p, size_t n) {
  for (size_t i = 0; i < n; ++i) access((uint64_t)p + i, 1, true, false, PC);
}
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  for (size_t i = 0; i < n; ++i) access((uint64_t)from + i, 1, false, false, PC);
  for (size_t i = 0; i < n; ++i) access((uint64_t)to + i, 1, true, false, PC);
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
  for (size_t i = 0; i < n; ++i) access((uint64_t)from + i, 1, false, false, PC);
  for (size_t i = 0; i < n; ++i) access((uint64_t)to + i, 1, true, false, PC);
  return memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
  for (size_t i = 0; i < n; ++i) access((uint64_t)to + i, 1, true, false, PC);
  return memset(to, value, n);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
#define ATOMICS(bits, T) \
  T __tsan_atomic##bits##_load(const volatile T* p, int) { \
    access((uint64_t)p, bits / 8, false, true, PC, bits / 8); \
    return *p; \
  } \
  void __tsan_atomic##bits##_store(volatile T* p, T v, int) { \
    access((uint64_t)p, bits / 8, true, true, PC, bits / 8); \
    *p = v; \
  } \
  T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) { \
    access((uint64_t)p, bits / 8, true, true, PC, bits / 8); \
    T old = *p; \
    *p = v; \
    return old; \
  }
ATOMICS(8, uint8_t)
ATOMICS(16, uint16_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)
// The compiler rounds to bfloat by calling this.
__bf16 __truncsfbf2(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    bits |= 0x400000;
  } else {
    bits += 0x7fff + (bits >> 16 & 1);
  }
  uint16_t high = bits >> 16;
  __bf16 out;
  memcpy(&out, &high, 2);
  return out;
}
}
