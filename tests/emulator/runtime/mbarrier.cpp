// mbarriers: a table beside the 8 bytes in shared memory. A phase is complete when as many threads have arrived and as
// many bytes have been copied as it expects; its agent's step n is what became visible when its n-th phase completed.
#include "runtime.h"

namespace emulator {

namespace {
struct Mbarrier {
  int arrivals;                    // per phase
  int missing;                     // of them
  int64_t bytes = 0;               // still to be copied; negative if copies came before they were expected
  uint32_t phase = 0, waited = 0;  // how many are complete, and how many of them a thread has waited for
  int thread, agent;               // that initialised it; of its copies
  Moment initialised;
  Block* block;
  bool fenced = false;  // the copy engine and other blocks see it
  int copies_in_flight = 0;
  uint32_t last_copy = 0;  // when it is over: the step
  Place last_copy_place = 0;
  Knowledge arriving;        // of those who arrived in this phase
  SharedKnowledge complete;  // of those who arrived in the last
  std::vector<Fiber*> waiting;
};
}  // namespace
static std::map<const uint64_t*, Mbarrier> mbarriers;

void reset_mbarriers() { mbarriers.clear(); }

static Mbarrier& find(const uint64_t* barrier, Site site) {
  auto found = mbarriers.find(barrier);
  if (found == mbarriers.end())
    fault("mbarrier", site, "no mbarrier was initialised at %s", locate((uintptr_t)barrier).c_str());
  if (options.check && !happened_before(found->second.initialised, running))
    fault("mbarrier", site, "unordered with the mbarrier_init by %s", who(found->second.initialised).c_str());
  return found->second;
}

void mbarrier_init(uint64_t* barrier, int arrivals, Site site) {
  uint32_t address = shared_address(barrier, site);
  if (address % 8) fault("misaligned", site, "mbarrier at shared address %u, no multiple of 8", address);
  if (arrivals < 1 || arrivals >= 1 << 20) fault("mbarrier", site, "%d arrivals, expected 1 to 2^20 - 1", arrivals);
  if (mbarriers.count(barrier)) fault("mbarrier", site, "initialised twice");
  access(running, barrier, sizeof *barrier, true, place_of(site), "mbarrier_init ");
  Mbarrier& b = mbarriers[barrier];
  b.arrivals = b.missing = arrivals;
  b.thread = running->number;
  b.block = running->block;
  b.agent = new_agent("copies for the mbarrier " + locate((uintptr_t)barrier));
  b.initialised = moment_of(running);
}

void mbarrier_init_fence() {
  for (auto& [address, b] : mbarriers) b.fenced |= b.thread == running->number;
}

static void complete_phase_if_done(Mbarrier& b, Place place) {
  if (b.missing || b.bytes) return;
  if (b.copies_in_flight)
    fault("async-hazard", place, "the mbarrier's phase is complete with copies in flight: too few bytes were expected");
  b.missing = b.arrivals;
  b.phase++;
  b.arriving.seen.resize(std::max<size_t>(b.arriving.seen.size(), b.agent + 1));
  b.arriving.seen[b.agent] = b.phase;
  b.complete = std::make_shared<const Knowledge>(std::move(b.arriving));
  b.arriving = Knowledge();
  for (Fiber* f : b.waiting) wake(f);
  b.waiting.clear();
}

static void check_fenced(const Mbarrier& b, Site site) {
  if (!b.fenced)
    fault("mbarrier", site, "no mbarrier_init_fence by %s, which initialised it", who(b.initialised).c_str());
}

void mbarrier_arrive(uint64_t* barrier, int bytes, Site site) {
  Mbarrier& b = find(barrier, site);
  if (b.block != running->block) {
    check_fenced(b, site);
    use_until(moment_of(running), *b.block, site, "arrival");
  }
  if (!b.missing) fault("mbarrier", site, "more than the %d arrivals of a phase", b.arrivals);
  if (bytes < 0) fault("mbarrier", site, "%d bytes expected", bytes);
  b.bytes += bytes;
  b.missing--;
  release(b.arriving, running);
  complete_phase_if_done(b, place_of(site));
  if (options.schedule == RANDOM) reschedule();
}

void mbarrier_wait(uint64_t* barrier, int parity, Site site) {
  Mbarrier& b = find(barrier, site);
  if (parity != 0 && parity != 1) fault("mbarrier", site, "parity %d, expected 0 or 1", parity);
  running->mbarrier = barrier;
  while ((int)(b.phase & 1) == parity) {
    b.waiting.push_back(running);
    park(AT_MBARRIER, site);
  }
  b.waited = b.phase;
  acquire(running, b.complete);
}

std::string mbarrier_state(const uint64_t* barrier) {
  const Mbarrier& b = mbarriers[barrier];
  return format("%s: phase %u misses %d of %d arrivals and %lld bytes", locate((uintptr_t)barrier).c_str(), b.phase,
                b.missing, b.arrivals, (long long)b.bytes);
}

// ---- copies ----------------------------------------------------------------------------------------------

Moment begin_copy(uint64_t* barrier, Site site) {
  Mbarrier& b = find(barrier, site);
  check_fenced(b, site);
  b.copies_in_flight++;
  b.last_copy = b.phase + 1;
  b.last_copy_place = place_of(site);
  return moment_of(b.agent, b.last_copy);
}

void complete_copy(uint64_t* barrier, int bytes, Place place) {
  Mbarrier& b = mbarriers[barrier];
  b.copies_in_flight--;
  b.bytes -= bytes;
  complete_phase_if_done(b, place);
}

void check_loads_at_end() {
  for (auto& [address, b] : mbarriers) {
    if (b.last_copy > b.waited)
      fault("async-hazard", b.last_copy_place, "the block ends and nobody has waited for the copy");
  }
}
}  // namespace emulator
