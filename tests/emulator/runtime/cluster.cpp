// Clusters: the barrier of all their threads, and that no block exits while others, or copies, use its shared memory.
#include "runtime.h"

namespace emulator {

// ---- the cluster's barrier: threads that have exited count as arrived, but hand nothing on ---------------------

static struct {
  int arrived, exited;
  uint32_t phase;
  Knowledge arriving;
  SharedKnowledge complete;
  std::vector<Fiber*> waiting;
} barrier;

void reset_cluster() { barrier = {}; }

static void complete_phase_if_done() {
  if (barrier.arrived + barrier.exited < (int)fibers.size()) return;
  barrier.phase++;
  barrier.arrived = 0;
  barrier.complete = std::make_shared<const Knowledge>(std::move(barrier.arriving));
  barrier.arriving = Knowledge();
  for (Fiber* f : barrier.waiting) wake(f);
  barrier.waiting.clear();
}

void cluster_arrive(Site site) {
  Fiber* f = running;
  if (f->arrived_at_cluster) fault("cluster", site, "arrived twice and has not waited");
  f->arrived_at_cluster = true;
  f->cluster_phase = barrier.phase;
  release(barrier.arriving, f);
  barrier.arrived++;
  complete_phase_if_done();
}

void cluster_wait(Site site) {
  Fiber* f = running;
  if (!f->arrived_at_cluster) fault("cluster", site, "waits and has not arrived");
  if (barrier.phase == f->cluster_phase) {
    barrier.waiting.push_back(f);
    park(AT_CLUSTER_BARRIER, site);
  }
  f->arrived_at_cluster = false;
  acquire(f, barrier.complete);
  if (options.schedule == RANDOM) reschedule();
}

// ---- what ends when a block exits --------------------------------------------------------------------------------

void use_until(Moment when, Block& block, Site site, const char* what) {
  if (block.exited == block.threads) fault("cluster", site, "%s, and block %u has exited", what, block.index.x);
  if (options.check) block.remote.push_back({when, place_of(site), what});
}

static void check_remote(const Block& block) {
  for (const Remote& r : block.remote) {
    if (!happened_before_exit(r.when, block))
      fault("cluster", r.place,
            format("block %u exits, unordered with the %s by ", block.index.x, r.what) + who(r.when));
  }
}

void check_cluster_at_exit() {
  if (!in_cluster()) return;
  if (running->arrived_at_cluster) fault("cluster", (Place)0, "the thread exits without the wait of cluster_sync");
  Block& block = *running->block;
  if (block.exited == block.threads) check_remote(block);
  barrier.exited++;
  complete_phase_if_done();
}
}  // namespace emulator
