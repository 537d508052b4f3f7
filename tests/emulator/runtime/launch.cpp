// Launches: the entry points that tests/emulator/emulator.py calls.
#include <dlfcn.h>
#include <numeric>

#include "runtime.h"

namespace emulator {

Options options;
static uint64_t random_state;

uint64_t random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

static std::vector<unsigned> launch_order(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (options.schedule == DESCENDING) std::reverse(order.begin(), order.end());
  if (options.schedule == RANDOM) {
    for (unsigned i = count; i > 1; i--) std::swap(order[i - 1], order[random_bits() % i]);
  }
  return order;
}
}  // namespace emulator

using namespace emulator;

extern "C" {
const char* emulator_fault() { return fault_text.c_str(); }

void emulator_statistics(uint64_t* out) { memcpy(out, &statistics, sizeof statistics); }

// Runs a kernel; returns 0, or 1 with the fault's text in emulator_fault().
int emulator_launch(void* kernel, unsigned cluster, unsigned grid, unsigned threads, size_t shared_bytes,
                    void** arguments, const Options* chosen) {
  static bool ready = (install_signal_handlers(), true);
  (void)ready;
  options = *chosen;
  random_state = options.seed * 0x9E3779B97F4A7C15ull + 0x1234567;
  for (int i = 0; i < 8; i++) random_bits();
  statistics = Statistics();
  fault_text.clear();
  running = nullptr;
  Dl_info module;
  module_base = dladdr(kernel, &module) ? (uintptr_t)module.dli_fbase : 0;
  if (threads < 1 || threads > 1024) {
    fault_text = format("bad-launch: %u threads per block, expected 1 to 1024", threads);
    return 1;
  }
  if (cluster < 1 || cluster > MAX_CLUSTER || grid % cluster) {
    fault_text = format("bad-launch: %u blocks in clusters of %u", grid, cluster);
    return 1;
  }
  begin_launch();
  for (unsigned i : launch_order(grid / cluster)) {
    if (options.last && i * cluster + options.last < grid) continue;
    begin_cluster_memory((int)cluster, shared_bytes);
    reset_cluster();
    reset_mbarriers();
    reset_bulk_copies();
    reset_products();
    run_cluster(i * cluster, threads, grid, (void (*)(void**))kernel, arguments);
    if (!fault_text.empty()) return 1;
    // A block that has nothing to do may leave before it takes any.
    for (const Block& block : blocks)
      if (block.device_end && block.device_end < shared_bytes) {
        fault_text = format("shared-layout: the launch gave %zu bytes of shared memory, block %u took %zu",
                            shared_bytes, block.index.x, block.device_end);
        return 1;
      }
  }
  return 0;
}
}
