// Happens-before: vector clocks of threads and of agents, which are what works beside the threads: copies that complete
// an mbarrier's phase, the wgmmas of a warp, the bulk stores of a thread. What an agent does at its step n is over for
// those who have waited for it, and for those who heard of that.
#include "runtime.h"

namespace emulator {

static std::vector<std::string> agents;                        // of this cluster, by name
static uint64_t next_thread = 1, launch_thread, first_thread;  // numbers never used twice

void begin_launch() { launch_thread = next_thread; }

void begin_cluster_order() {
  agents.clear();
  first_thread = next_thread;
  next_thread += fibers.size();
}

int new_agent(const std::string& name) {
  agents.push_back(name);
  next_thread++;
  return (int)(fibers.size() + agents.size() - 1);
}

// ---- moments ------------------------------------------------------------------------------------------

Moment moment_of(Fiber* f) { return (first_thread + f->number) << 32 | f->clock; }

Moment moment_of(int agent, uint32_t step) { return (first_thread + agent) << 32 | step; }

// The index in a clock; of another cluster it is larger than any.
static uint64_t index_of(Moment m) { return (m >> 32) - first_thread; }

static bool covers(const Clock& clock, Moment m) {
  return index_of(m) < clock.size() && (uint32_t)m <= clock[index_of(m)];
}

bool is_agent(Moment m) { return index_of(m) >= fibers.size() && index_of(m) < fibers.size() + agents.size(); }

bool happened_before(Moment m, const Fiber* f) {
  if (m >> 32 < launch_thread) return true;  // an earlier launch
  return index_of(m) == (uint64_t)f->number || (f->knows && covers(f->knows->seen, m));
}

bool happened_before_exit(Moment m, const Block& block) {
  return std::any_of(fibers.begin(), fibers.end(),
                     [&](const Fiber& f) { return f.block == &block && happened_before(m, &f); });
}

bool shown_to_async(Moment m, const Fiber* f) {
  if (index_of(m) == (uint64_t)f->number && (uint32_t)m <= f->fenced) return true;
  return m >> 32 < launch_thread || (f->knows && covers(f->knows->fenced, m));
}

std::string who(const Fiber* f) {
  const ThreadIndex& i = f->index;
  return format("thread %d (warp %d lane %d) of block %u", i.linear, i.warp, i.lane, i.block.x);
}

std::string who(Moment m) {
  if (is_agent(m)) return agents[index_of(m) - fibers.size()];
  if (index_of(m) >= fibers.size()) return "a thread of another block";
  const Fiber& f = fibers[index_of(m)];
  return "thread " + std::to_string(f.index.linear) + of_block(*f.block);
}

// ---- knowledge: of all whose events happened before, handed on when threads meet or wait ---------------

static void merge(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) into[i] = std::max(into[i], from[i]);
}

static void merge(Knowledge& into, const SharedKnowledge& from) {
  if (!from) return;
  merge(into.seen, from->seen);
  merge(into.fenced, from->fenced);
}

static void set(Clock& clock, int index, uint32_t value) {
  if ((int)clock.size() <= index) clock.resize(index + 1);
  clock[index] = value;
}

// What a thread adds to what it knows: all that it has done itself.
static void add_own(Knowledge& into, Fiber* f) {
  set(into.seen, f->number, f->clock++);
  // Others, whom this thread had told of more, may have fenced since.
  if (f->fenced && !covers(into.fenced, moment_of(f->number, f->fenced))) set(into.fenced, f->number, f->fenced);
}

void join_all(const std::vector<Fiber*>& threads) {
  if (!options.check) return;
  auto joined = std::make_shared<Knowledge>();
  const Knowledge* last = nullptr;
  for (Fiber* f : threads) {
    if (f->knows.get() != last) merge(*joined, f->knows);
    last = f->knows.get();
  }
  for (Fiber* f : threads) add_own(*joined, f);
  for (Fiber* f : threads) f->knows = joined;
}

void release(Knowledge& into, Fiber* f) {
  if (!options.check) return;
  merge(into, f->knows);
  add_own(into, f);
}

template <class Change>
static SharedKnowledge with(const SharedKnowledge& known, Change change) {
  auto knows = known ? std::make_shared<Knowledge>(*known) : std::make_shared<Knowledge>();
  change(*knows);
  return knows;
}

// Threads that knew the same and learn the same go on sharing it, which saves time here and in later checks.
void acquire(Fiber* f, const SharedKnowledge& from) {
  static SharedKnowledge last_known, last_from, last_result;
  if (!options.check || !from || f->knows == from) return;
  if (f->knows != last_known || from != last_from) {
    last_known = f->knows;
    last_from = from;
    last_result = with(f->knows, [&](Knowledge& k) { merge(k, from); });
  }
  f->knows = last_result;
}

void learn_step(const std::vector<Fiber*>& threads, int agent, uint32_t step) {
  if (!options.check) return;
  SharedKnowledge known, result;
  for (Fiber* f : threads) {
    if (!result || f->knows != known) {
      known = f->knows;
      result = with(known, [&](Knowledge& k) { set(k.seen, agent, step); });
    }
    f->knows = result;
  }
}

// What happened before in the order of this thread is visible to the async proxy for all who learn of this fence.
void async_proxy_fence() {
  static SharedKnowledge last_known, last_result;
  Fiber* f = running;
  if (!options.check) return;
  if (!last_result || f->knows != last_known) {
    last_known = f->knows;
    last_result = with(f->knows, [](Knowledge& k) { merge(k.fenced, k.seen); });
  }
  f->knows = last_result;
  f->fenced = f->clock++;
}
}  // namespace emulator
