// Fibers, the scheduler, barriers and warp collectives.
#include <sys/mman.h>

#include "runtime.h"

namespace emulator {

std::vector<Fiber> fibers;
std::vector<Warp> warps;
Fiber* running;
ThreadIndex* current;
Statistics statistics;

static std::vector<uint8_t*> stacks;
static void* launcher_stack;
static int turn;  // the warp whose threads run
static void (*kernel)(void**);
static void** kernel_arguments;

extern "C" void emulator_switch(void** save, void* to);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

// ---- scheduler -----------------------------------------------------------------------------------------

static Warp* next_warp() {
  int n = (int)warps.size(), start = turn, step = options.schedule == DESCENDING ? n - 1 : 1;
  if (options.schedule == RANDOM && (!warps[turn].runnable || random_bits() % 16 == 0)) start = random_bits() % n;
  for (int k = 0; k < n; k++) {
    int w = (start + k * step) % n;
    if (warps[w].runnable) return &warps[turn = w];
  }
  return nullptr;
}

static int next_lane(unsigned runnable) {
  if (options.schedule == ASCENDING) return __builtin_ctz(runnable);
  if (options.schedule == DESCENDING) return 31 - __builtin_clz(runnable);
  int start = random_bits() & 31;
  unsigned rotated = runnable >> start | (start ? runnable << (32 - start) : 0);
  return (__builtin_ctz(rotated) + start) & 31;
}

std::string thread_states() {
  static const char* names[] = {"runnable",       "in a warp operation", "at a barrier",
                                "at an mbarrier", "at cluster_sync",     "exited"};
  std::map<std::string, int> counts;
  for (const Fiber& f : fibers) {
    std::string state = names[f.state];
    if (f.state != EXITED) state += of_block(*f.block);
    if (f.state != RUNNABLE && f.state != EXITED) state += " at " + describe(place_of(f.waits_at));
    if (f.state == AT_MBARRIER) state += " (" + mbarrier_state(f.mbarrier) + ")";
    counts[state]++;
  }
  std::string text;
  for (auto& [state, count] : counts) text += (text.empty() ? "" : ", ") + std::to_string(count) + " threads " + state;
  return text;
}

static void check_end();

void reschedule() {
  if (++statistics.switches > options.max_steps) fault("livelock", (Place)0, thread_states());
  complete_some_loads();
  Warp* warp = next_warp();
  while (!warp && complete_a_load()) warp = next_warp();
  if (!warp) {
    auto has_exited = [](const Fiber& f) { return f.state == EXITED; };
    if (!std::all_of(fibers.begin(), fibers.end(), has_exited)) fault("deadlock", (Place)0, thread_states());
    check_end();
    leave_launch();
  }
  Fiber *next = warp->lanes[next_lane(warp->runnable)], *last = running;
  if (next == last) return;
  running = next;
  current = &next->index;
  emulator_switch(&last->stack_pointer, next->stack_pointer);
}

void park(State state, Site site) {
  Fiber* f = running;
  f->state = state;
  f->waits_at = site;
  warp_of(f).runnable &= ~(1u << f->index.lane);
  while (f->state != RUNNABLE) reschedule();
}

void wake(Fiber* f) {
  f->state = RUNNABLE;
  warp_of(f).runnable |= 1u << f->index.lane;
}

void leave_launch() {
  in_kernel = false;
  void* abandoned;
  emulator_switch(&abandoned, launcher_stack);
  __builtin_unreachable();
}

static void fiber_main() {
  kernel(kernel_arguments);
  Fiber* f = running;
  check_exit();
  f->state = EXITED;
  warp_of(f).runnable &= ~(1u << f->index.lane);
  warp_of(f).exited |= 1u << f->index.lane;
  f->block->exited++;
  check_cluster_at_exit();
  reschedule();
}

static void make_fiber(int number, Block& block, int t, unsigned block_size, unsigned grid_size) {
  Fiber& f = fibers[number];
  const int rank = int(&block - blocks.data()), warps_per_block = (int)(block_size + 31) / 32;
  f.index = {{(unsigned)t, 0, 0}, block.index, {block_size, 1, 1}, {grid_size, 1, 1}, t & 31, t / 32, t, rank};
  f.block = &block;
  f.number = number;
  f.warp = rank * ((warps_per_block + 3) / 4 * 4) + t / 32;  // whole warpgroups, also of several blocks
  f.stack = stacks[number];
  f.clock = 1;
  // Staggered tops keep the stacks out of each other's cache sets.
  auto* top = (uint64_t*)(f.stack + STACK_BYTES - 64 - (t % 32) * 64);
  *--top = 0;
  *--top = (uint64_t)(void*)fiber_main;
  for (int i = 0; i < 6; i++) *--top = 0;
  f.stack_pointer = top;
  if ((int)warps.size() <= f.warp) warps.resize(f.warp + 1);
  Warp& w = warps[f.warp];
  w.lanes[t & 31] = &f;
  w.exists |= 1u << (t & 31);
}

void run_cluster(unsigned first_block, unsigned block_size, unsigned grid_size, void (*entry)(void**),
                 void** arguments) {
  const int threads = (int)(block_size * blocks.size());
  while ((int)stacks.size() < threads) {
    auto* m = (uint8_t*)mmap(nullptr, STACK_BYTES + 4096, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(m, 4096, PROT_NONE);
    stacks.push_back(m + 4096);
  }
  kernel = entry;
  kernel_arguments = arguments;
  warps.clear();
  fibers.clear();
  fibers.resize(threads);
  begin_cluster_order();
  int number = 0;
  for (Block& block : blocks) {
    block.index = {first_block++, 0, 0};
    block.threads = (int)block_size;
    for (unsigned t = 0; t < block_size; t++) make_fiber(number++, block, (int)t, block_size, grid_size);
  }
  for (Warp& w : warps) w.runnable = w.exists;
  turn = options.schedule == DESCENDING ? (int)warps.size() - 1 : 0;
  Warp& w = warps[turn];
  running = w.lanes[next_lane(w.runnable)];
  current = &running->index;
  in_kernel = true;
  emulator_switch(&launcher_stack, running->stack_pointer);
  running = nullptr;
}

static bool same_place(Site a, Site b) { return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file)); }

// ---- barriers -------------------------------------------------------------------------------------------

void block_barrier(int id, int threads, Site site) {
  Fiber* f = running;
  bool whole_block = threads == 0;
  int expected = whole_block ? f->block->threads : threads;
  if (id < 0 || id > 15) fault("bad-barrier", site, "barrier id %d, expected 0 to 15", id);
  if (!whole_block && (threads % 32 || threads < 0))
    fault("bad-barrier", site, "%d threads, no multiple of 32", threads);
  Barrier& b = f->block->barriers[id];
  if (b.arrived.empty()) {
    b.expected = expected;
    b.site = site;
  } else if (b.expected != expected) {
    fault("bad-barrier", site, "barrier %d met with %d and with %d threads", id, b.expected, expected);
  } else if (whole_block && !same_place(b.site, site)) {
    fault("divergent-barrier", site, "threads of one block wait at __syncthreads of lines %d and %d", b.site.line,
          site.line);
  }
  if (whole_block && f->block->exited)
    fault("divergent-barrier", site, "%d threads have already exited", f->block->exited);
  b.arrived.push_back(f);
  if ((int)b.arrived.size() < b.expected) {
    park(AT_BARRIER, site);
    return;
  }
  statistics.barriers++;
  std::vector<Fiber*> all;
  all.swap(b.arrived);
  join_all(all);
  for (Fiber* other : all) {
    if (other != f) wake(other);
  }
  if (options.schedule == RANDOM) reschedule();
}

// ---- warp collectives -----------------------------------------------------------------------------------

static void meet(int kind, unsigned mask, void* argument, Collective body, bool orders_memory, Site site) {
  Fiber* f = running;
  Warp& w = warp_of(f);
  int lane = f->index.lane;
  statistics.collectives++;
  if (mask == ~0u) mask = w.exists;
  if (!(mask >> lane & 1)) fault("divergence", site, "lane %d is not in its own mask %08x", lane, mask);
  if (mask & w.exited) fault("divergence", site, "lanes %08x of the mask have exited", mask & w.exited);
  Meeting* meeting = nullptr;
  for (Meeting& m : w.meetings) {
    if (m.arrived && (m.mask & mask)) meeting = &m;
  }
  if (meeting) {
    const Site& at = meeting->site;
    if (meeting->mask != mask || meeting->kind != kind || !same_place(at, site))
      fault("divergence", site, "lanes %08x of the warp are in another operation at line %d", meeting->arrived,
            at.line);
  } else {
    for (Meeting& m : w.meetings) {
      if (!m.arrived) meeting = &m;
    }
    if (!meeting) fault("divergence", site, "more than four operations of one warp are open");
    meeting->mask = mask;
    meeting->kind = kind;
    meeting->site = site;
    meeting->body = body;
  }
  meeting->arguments[lane] = argument;
  meeting->arrived |= 1u << lane;
  if (meeting->arrived != mask) {
    park(IN_COLLECTIVE, site);
    return;
  }
  if (body) body(meeting->arguments, mask);
  static std::vector<Fiber*> all;  // kept for its memory
  all.clear();
  for (int i = 0; i < 32; i++) {
    if (mask >> i & 1) all.push_back(w.lanes[i]);
  }
  if (orders_memory) join_all(all);
  meeting->arrived = 0;
  for (Fiber* other : all) {
    if (other != f) wake(other);
  }
}

// Shuffles, ldmatrix and mma exchange registers; like the hardware they order no memory.
void warp_collective(int kind, unsigned mask, void* argument, Collective body, Site site) {
  meet(kind, mask, argument, body, false, site);
}

void warp_barrier(unsigned mask, Site site) { meet(0, mask, nullptr, nullptr, true, site); }

void check_exit() {
  Fiber* f = running;
  if (!f->open_group.empty() || !f->groups.empty())
    fault("async-hazard", (Place)0, "the thread exits with cp.async in flight");
  check_stores_at_exit();
  check_products_at_exit();
  for (Meeting& m : warp_of(f).meetings) {
    if (m.arrived && (m.mask >> f->index.lane & 1))
      fault("divergence", m.site, "lane %d exits while its warp waits for it", f->index.lane);
  }
  const Barrier& b = f->block->barriers[0];
  if (!b.arrived.empty())
    fault("divergent-barrier", b.site, "thread %d exits while %zu threads wait at __syncthreads", f->index.linear,
          b.arrived.size());
}

static void check_end() {
  check_loads_at_end();
  check_products_at_end();
}
}  // namespace emulator
