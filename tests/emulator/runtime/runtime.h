// The emulator's state, shared by its parts. One cluster of blocks runs at a time, one fiber per thread.
#pragma once
#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../include/cuda_on_cpu.h"
#include "shadow.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#undef __shared__

namespace emulator {

// ---- options of a launch, mirrored by tests/emulator/emulator.py --------------------------------
enum Schedule { ASCENDING, DESCENDING, RANDOM };
enum Completion { LATE, EARLY, EITHER };
struct Options {
  int schedule;    // which runnable thread goes next
  int completion;  // when cp.async and TMA really copy
  int check;       // shadow memory on
  int preempt;     // switch threads at one access in so many; 0: never
  uint64_t seed;
  uint64_t max_steps;  // switches before a launch counts as a livelock
  unsigned last;       // run so many blocks at the end of the grid alone; 0: all
};
extern Options options;
uint64_t random_bits();

// ---- order: who has seen what of whom ------------------------------------------------------------------
typedef std::vector<uint32_t> Clock;  // by thread of the cluster, then by agent
struct Knowledge {
  Clock seen;    // what happened before
  Clock fenced;  // of that, what a proxy fence has shown to the async proxy
};
typedef std::shared_ptr<const Knowledge> SharedKnowledge;

Place place_of(Site);
Place place_of(void* pc);
std::string describe(Place);

// ---- threads -----------------------------------------------------------------------------------------
enum State { RUNNABLE, IN_COLLECTIVE, AT_BARRIER, AT_MBARRIER, AT_CLUSTER_BARRIER, EXITED };
struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};
struct Sums {  // of a thread, on its stack
  const float *low, *high;
  Place place;
};
struct Block;
struct Fiber {
  ThreadIndex index;
  Block* block;
  int number, warp;  // in the cluster
  void* stack_pointer;
  uint8_t* stack;
  State state;
  Site waits_at;
  SharedKnowledge knows;
  uint32_t clock;
  uint32_t fenced;  // its own clock at its last proxy fence, which `knows` need not have
  int arrays_taken;
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;
  const uint64_t* mbarrier;         // that it waits for
  std::vector<Sums> sums_of_wgmma;  // not to be touched before the wait
  bool arrived_at_cluster;          // and not waited since
  uint32_t cluster_phase;           // in which it arrived
};
struct Meeting {  // of the lanes of a mask at a warp collective
  unsigned mask = 0, arrived = 0;
  int kind = 0;
  Site site{};
  Collective body = nullptr;
  void* arguments[32];
};
struct Warp {
  unsigned exists = 0, runnable = 0, exited = 0;
  Fiber* lanes[32] = {};
  Meeting meetings[4];
};
extern std::vector<Fiber> fibers;
extern std::vector<Warp> warps;
extern Fiber* running;
inline Warp& warp_of(const Fiber* f) { return warps[f->warp]; }
struct Barrier {
  int expected = 0;
  Site site{};
  std::vector<Fiber*> arrived;
};
struct Array {  // of shared memory, as carved by the kernel
  std::string name;
  size_t bytes, align;
  uint8_t* at;
};
struct Remote {  // an arrival here from another block, or a copy from or to here
  Moment when;
  Place place;
  const char* what;
};
struct Block {
  uint3 index;
  int threads, exited = 0;
  Barrier barriers[16];
  uint8_t* window;  // its shared memory
  std::vector<Array> arrays;
  size_t device_end = 0, window_end = 0;
  std::vector<Remote> remote;
};
extern std::vector<Block> blocks;  // of the cluster
inline bool in_cluster() { return blocks.size() > 1; }

void park(State, Site);
void wake(Fiber*);
void reschedule();
void check_exit();  // faults if others wait for the exiting thread
// Runs the blocks of the cluster, which begin_cluster_memory has made.
void run_cluster(unsigned first_block, unsigned block_size, unsigned grid_size, void (*kernel)(void**),
                 void** arguments);
std::string thread_states();
[[noreturn]] void leave_launch();

// ---- happens-before (order.cpp) ------------------------------------------------------------------------
void begin_launch();
void begin_cluster_order();
// What works beside the threads; its steps are seen by those who waited for them.
int new_agent(const std::string& name);
Moment moment_of(Fiber*);
Moment moment_of(int agent, uint32_t step);
bool is_agent(Moment);
bool happened_before(Moment, const Fiber*);
bool happened_before_exit(Moment, const Block&);  // of the block's last thread, in any schedule
bool shown_to_async(Moment, const Fiber*);        // what was written then, by a proxy fence that the thread knows of
void join_all(const std::vector<Fiber*>&);        // everyone learns what everyone knew
void release(Knowledge& into, Fiber*);
void acquire(Fiber*, const SharedKnowledge&);
void learn_step(const std::vector<Fiber*>&, int agent, uint32_t step);
std::string who(const Fiber*);
std::string who(Moment);

// ---- faults: end the launch with a message "kind: text at file:line by thread" --------------------
[[noreturn]] void fault(const char* kind, Place, const std::string& text);
[[noreturn]] void fault(const char* kind, Site, const char* format, ...) __attribute__((format(printf, 3, 4)));
std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
extern std::string fault_text;
extern bool in_kernel;
extern uintptr_t module_base;
void install_signal_handlers();

// ---- memory --------------------------------------------------------------------------------------------
struct Region {  // a global buffer, or the windows of shared memory
  std::string name;
  uintptr_t low, high;
  Shadow shadow;
  void* mapping;
  size_t mapped;
};
void begin_cluster_memory(int size, size_t dynamic_bytes);
void access(Fiber*, const void*, size_t bytes, bool write, Place, const char* what);
// What the async proxy does for a thread, which is over at `when`, a moment of an agent.
void async_access(Fiber*, Moment when, const void*, size_t bytes, bool write, Place, const char* what);
// The last `bytes` at p will be, or have been, written by a copy of the running thread.
void mark_copy(const void* p, size_t bytes, bool in_flight, Place);
std::string locate(uintptr_t address);
bool is_shared(const void*);  // of the running thread's block
Block& block_of(const void* shared, Site);
std::string of_block(const Block&);  // for messages, if the cluster has several
constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t SHARED_WINDOW = 256 << 10;  // what the descriptors of wgmma can address
constexpr int MAX_CLUSTER = 8;

constexpr int PIECE = 16;  // bytes that stay together where rows are swizzled
// The byte of a tile swizzled by rows of 32, 64 or 128 bytes that lies at a shared address.
inline uint32_t swizzled(uint32_t address, int row = 128) { return address ^ (address >> 7 & (row / 16 - 1)) << 4; }

// ---- mbarriers, TMA and wgmma ----------------------------------------------------------------------------
void reset_mbarriers();
std::string mbarrier_state(const uint64_t*);
Moment begin_copy(uint64_t* barrier, Site);  // returns when it will be over
void complete_copy(uint64_t* barrier, int bytes, Place);
void check_loads_at_end();
bool complete_a_load();      // false: none is in flight
void complete_some_loads();  // if chance is to decide when
void reset_bulk_copies();
void check_stores_at_exit();
void reset_products();
void check_products_at_exit();
void check_products_at_end();
void reset_cluster();
void use_until(Moment, Block&, Site, const char* what);  // faults if the block exits earlier
void check_cluster_at_exit();
float from_half(uint16_t);

struct Statistics {
  uint64_t switches, collectives, accesses, barriers, ldmatrix_phases, ldmatrix_conflicts;
};
extern Statistics statistics;
}  // namespace emulator
