// Memory: global buffers between guard pages, the windows of shared memory, and the shadow of all.
#include <sys/mman.h>

#include "prefetch_on_cpu.h"
#include "runtime.h"

namespace emulator {

std::vector<Block> blocks;
static std::map<uintptr_t, std::unique_ptr<Region>> buffers;  // by the end of the mapping
static std::array<Region*, 64> found_last;                    // by pages, so that most are found at once
static Region windows;                                        // of a cluster's blocks, one after the other
static std::vector<uint8_t> owner;                            // of each byte of them: 1 + array number, 0 for red zones
static size_t dynamic_bytes;

// ---- global buffers ---------------------------------------------------------------------------------------

static void* map_pages(size_t bytes, int protection) {
  return mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

extern "C" void* emulator_allocate(const char* name, size_t bytes, int initialised) {
  constexpr size_t PAGE = 4096;
  size_t inner = (bytes + 16 + PAGE - 1) / PAGE * PAGE;
  auto* mapping = (uint8_t*)map_pages(inner + 2 * PAGE, PROT_NONE);
  mprotect(mapping + PAGE, inner, PROT_READ | PROT_WRITE);
  uint8_t* low = mapping + PAGE + inner - (bytes + 15) / 16 * 16;  // ends at the guard page, 16-byte aligned
  auto region = std::make_unique<Region>();
  *region = {name, (uintptr_t)low, (uintptr_t)low + bytes, {}, mapping, inner + 2 * PAGE};
  region->shadow.grow(bytes);
  region->shadow.clear(0, bytes, initialised);
  memset(mapping + PAGE, 0xff, inner);
  buffers[(uintptr_t)mapping + region->mapped] = std::move(region);
  return low;
}

extern "C" void emulator_free(void* low) {
  auto found = buffers.upper_bound((uintptr_t)low);
  if (found == buffers.end()) return;
  found_last.fill(nullptr);
  munmap(found->second->mapping, found->second->mapped);
  buffers.erase(found);
}

static Region* find(uintptr_t a) {
  if (a >= windows.low && a < windows.high) return &windows;
  Region*& last = found_last[a / 4096 % found_last.size()];
  if (last && a >= last->low && a < last->high) return last;
  auto found = buffers.upper_bound(a);
  if (found == buffers.end() || a < (uintptr_t)found->second->mapping) return nullptr;
  return last = found->second.get();
}

// ---- shared memory ------------------------------------------------------------------------------------------

static void clear_window(size_t i, size_t bytes) {
  const size_t start = i * SHARED_WINDOW;
  memset((uint8_t*)windows.low + start, 0xff, bytes);  // NaN in every format
  windows.shadow.clear(start, bytes, false);
  std::fill_n(owner.begin() + start, bytes, 0);
}

void begin_cluster_memory(int size, size_t bytes) {
  if (!windows.low) {
    windows.name = "shared memory";
    // Aligned to the size of one, so that the bits of addresses are those of offsets.
    auto mapping = (uintptr_t)map_pages((MAX_CLUSTER + 1) * SHARED_WINDOW, PROT_READ | PROT_WRITE);
    windows.low = (mapping + SHARED_WINDOW - 1) / SHARED_WINDOW * SHARED_WINDOW;
  }
  windows.high = windows.low + size * SHARED_WINDOW;
  for (size_t i = 0; i < blocks.size(); i++) clear_window(i, blocks[i].window_end);
  for (size_t bytes_known = owner.size(); bytes_known < size * SHARED_WINDOW; bytes_known = owner.size()) {
    owner.resize(bytes_known + SHARED_WINDOW);
    windows.shadow.grow(owner.size());
    clear_window(bytes_known / SHARED_WINDOW, SHARED_WINDOW);
  }
  blocks.assign(size, Block());
  for (int i = 0; i < size; i++) blocks[i].window = (uint8_t*)windows.low + i * SHARED_WINDOW;
  dynamic_bytes = bytes;
}

void* shared_take(size_t bytes, size_t align, const char* name, Site site) {
  Block& block = *running->block;
  size_t number = running->arrays_taken++;
  if (number < block.arrays.size()) {
    const Array& a = block.arrays[number];
    if (a.bytes != bytes || a.align != align || a.name != name)
      fault("shared-layout", site, "threads carve shared memory differently: '%s' and '%s'", a.name.c_str(), name);
    return a.at;
  }
  block.device_end = (block.device_end + align - 1) / align * align + bytes;
  if (block.device_end > dynamic_bytes)
    fault("shared-layout", site, "'%s' ends at byte %zu, the launch gave %zu bytes", name, block.device_end,
          dynamic_bytes);
  // A red zone before each array, and the same alignment as on the device.
  size_t start = (block.window_end + 64 + align - 1) / align * align;
  block.window_end = (start + bytes + 63) / 64 * 64;
  if (block.window_end + 64 > SHARED_WINDOW || block.arrays.size() == 254)
    fault("shared-layout", site, "more shared memory than the emulator has");
  block.arrays.push_back({name, bytes, align, block.window + start});
  memset(&owner[block.window + start - (uint8_t*)windows.low], (int)block.arrays.size(), bytes);
  return block.arrays.back().at;
}

void shared_all_taken(size_t given, Site site) {
  size_t taken = running->block->device_end;
  if (taken != given) fault("shared-layout", site, "the kernel takes %zu bytes and is compiled for %zu", taken, given);
}

void shared_all(const char* name, Site site) {
  if (dynamic_bytes) shared_take(dynamic_bytes, 1024, name, site);
}

void* shared_start() {
  const std::vector<Array>& arrays = running->block->arrays;
  return arrays.empty() ? nullptr : arrays[0].at;
}

uint8_t* shared_window() { return running->block->window; }

uint32_t shared_address(const void* p, Site site) {
  if (!is_shared(p)) fault("bad-address", site, "%p is not in shared memory", p);
  return (uint32_t)((uint8_t*)p - shared_window());
}

void* in_block(const void* p, int rank, Site site) {
  if (rank < 0 || rank >= (int)blocks.size())
    fault("cluster", site, "rank %d in a cluster of %zu", rank, blocks.size());
  return blocks[rank].window + shared_address(p, site);
}

bool is_shared(const void* p) { return (uintptr_t)p - (uintptr_t)shared_window() < SHARED_WINDOW; }

static Block& block_at(uintptr_t a) { return blocks[(a - windows.low) / SHARED_WINDOW]; }

Block& block_of(const void* p, Site site) {
  if (find((uintptr_t)p) != &windows) fault("bad-address", site, "%p is not in the cluster's shared memory", p);
  return block_at((uintptr_t)p);
}

std::string of_block(const Block& block) {
  return in_cluster() ? " of block " + std::to_string(block.index.x) : std::string();
}

// ---- accesses -------------------------------------------------------------------------------------------------

std::string locate(uintptr_t a) {
  const Region* r = find(a);
  if (!r) return "outside every array";
  if (r != &windows) {
    if (a >= r->high)
      return format("%zu bytes past the end of '%s' (%zu bytes)", a - r->high, r->name.c_str(), r->high - r->low);
    if (a < r->low) return format("%zu bytes before '%s'", r->low - a, r->name.c_str());
    return format("'%s' byte %zu", r->name.c_str(), a - r->low);
  }
  const Block& block = block_at(a);
  const Array* before = nullptr;
  for (const Array& array : block.arrays) {
    if ((uintptr_t)array.at > a) break;
    before = &array;
  }
  if (!before) return "before every shared array" + of_block(block);
  size_t offset = a - (uintptr_t)before->at;
  if (offset < before->bytes) return format("shared '%s' byte %zu", before->name.c_str(), offset) + of_block(block);
  return format("%zu bytes past the end of shared '%s' (%zu bytes)", offset - before->bytes, before->name.c_str(),
                before->bytes) +
         of_block(block);
}

static bool inside(const Region* r, uintptr_t a, size_t bytes) {
  if (a < r->low || a + bytes > r->high) return false;
  if (r != &windows) return true;
  uint8_t first = owner[a - windows.low];
  return first && first == owner[a + bytes - 1 - windows.low] && &block_at(a) == &block_at(a + bytes - 1);
}

template <class F>
static void each_cell(Region* r, uintptr_t a, size_t bytes, F body) {
  r->shadow.each_cell(a - r->low, a + bytes - r->low, r->high - r->low, body);
}

// By a thread, or by the async proxy for it.
struct Access {
  Fiber* f;
  Moment when;
  bool async, write;
  Place place;
  const char* what;

  std::string text(uintptr_t a) const { return std::string(what) + (write ? "write to " : "read of ") + locate(a); }
};

static void check_order(const Access& x, uintptr_t a, Moment other, Place other_place, const char* other_verb) {
  if (!other || happened_before(other, x.f)) return;
  fault(is_agent(other) ? "async-hazard" : "race", x.place,
        x.text(a) + ", unordered with the " + other_verb + " by " + who(other) + " at " + describe(other_place));
}

static void check_proxy(const Access& x, uintptr_t a, const Cell& c) {
  if (!x.async || !c.write || is_agent(c.write) || shown_to_async(c.write, x.f)) return;
  fault("proxy", x.place,
        x.text(a) + ", no async_proxy_fence since the write by " + who(c.write) + " at " + describe(c.write_place));
}

// Faults unless all that the access has to come after has happened before.
static void check_cell(const Access& x, const Cell& c, uintptr_t a) {
  check_order(x, a, c.write, c.write_place, "write");
  check_proxy(x, a, c);
  for (int i = 0; x.write && i < READS; i++) check_order(x, a, c.reads[i], c.read_places[i], "read");
}

static void record_write(const Access& x, Cell& c) {
  for (Moment& read : c.reads) read = 0;
  c.write = x.when;
  c.write_place = x.place;
  c.initialised = true;
}

// Where a read is kept: in place of one that it covers, or else of any.
static int slot_for_read(const Access& x, const Cell& c) {
  for (int i = 0; i < READS; i++) {
    if (!c.reads[i] || c.reads[i] >> 32 == x.when >> 32 || happened_before(c.reads[i], x.f)) return i;
  }
  return random_bits() % READS;
}

static void record_read(const Access& x, Cell& c, int slot) {
  c.reads[slot] = x.when;
  c.read_places[slot] = x.place;
}

static void check(const Access& x, const void* p, size_t bytes) {
  auto a = (uintptr_t)p;
  Region* r = find(a);
  if (!r) return;  // a constant of the module, or a guard page's business
  statistics.accesses++;
  if (!inside(r, a, bytes)) {
    uintptr_t end = a + bytes - 1;
    bool starts_inside = inside(r, a, 1);
    fault("out-of-bounds", x.place,
          format("%s%s of %zu bytes, %s", x.what, x.write ? "write" : "read", bytes,
                 locate(starts_inside ? end : a).c_str()));
  }
  if (!options.check) return;
  // What a thread has just done it may do again, and neighbours mostly have the same history: neither needs a look.
  Cell last;
  bool any = false;
  int slot = 0;
  each_cell(r, a, bytes, [&](Cell& c) {
    if (c.copy_in_flight)
      fault("async-hazard", x.place, x.text(a) + " while the cp.async of " + describe(c.write_place) + " is in flight");
    if (!x.async && c.knows(x.when, x.write)) return;
    if (!x.write && !c.initialised) fault("uninitialised", x.place, x.text(a) + ", never written");
    if (!any || !c.has_moments_of(last)) {
      check_cell(x, c, a);
      if (!x.write) slot = slot_for_read(x, c);
      last = c;
      any = true;
    }
    if (x.write)
      record_write(x, c);
    else
      record_read(x, c, slot);
  });
}

void access(Fiber* f, const void* p, size_t bytes, bool write, Place place, const char* what) {
  check({f, moment_of(f), false, write, place, what}, p, bytes);
}

void async_access(Fiber* f, Moment when, const void* p, size_t bytes, bool write, Place place, const char* what) {
  check({f, when, true, write, place, what}, p, bytes);
}

// No access, so no race and no use of what nobody wrote; but its address is to be in an array.
void prefetch_line(const void* p, Site site) {
  const auto a = (uintptr_t)p;
  const Region* r = find(a);
  if (!r || r == &windows || !inside(r, a, 1)) fault("out-of-bounds", site, "prefetch of %s", locate(a).c_str());
}

void mark_copy(const void* p, size_t bytes, bool in_flight, Place place) {
  if (!options.check) return;
  each_cell(&windows, (uintptr_t)p, bytes, [&](Cell& c) {
    c.copy_in_flight = in_flight;
    if (in_flight)
      c.write_place = place;
    else
      c.write = moment_of(running);  // from here on it counts as this thread's write
  });
}

void memory_access(const void* p, size_t bytes, bool write, Site site) {
  if ((uintptr_t)p % bytes) fault("misaligned", site, "access of %zu bytes, %s", bytes, locate((uintptr_t)p).c_str());
  if ((uintptr_t)p - (uintptr_t)running->stack < STACK_BYTES) return;
  if (options.preempt && random_bits() % options.preempt == 0) reschedule();
  access(running, p, bytes, write, place_of(site), "");
}

void atomic_access(const void* p, size_t bytes, Site site) {
  Region* r = find((uintptr_t)p);
  if (!r || !inside(r, (uintptr_t)p, bytes))
    fault("out-of-bounds", site, "atomic operation on %zu bytes, %s", bytes, locate((uintptr_t)p).c_str());
}
}  // namespace emulator

// ---- callbacks: g++ -fsanitize=thread calls these at every memory access of the kernel ---------------------

using namespace emulator;

static void check_sums(void* p, bool write, void* pc) {
  for (const Sums& s : running->sums_of_wgmma) {
    if (p >= s.low && p < s.high)
      fault("async-hazard", place_of(pc),
            format("%s sums before the wait for the wgmma at ", write ? "write to" : "read of") + describe(s.place));
  }
}

static inline __attribute__((always_inline)) void on_access(void* p, size_t bytes, bool write, void* pc) {
  if (!in_kernel) return;
  if ((uintptr_t)p - (uintptr_t)running->stack < STACK_BYTES) {
    if (!running->sums_of_wgmma.empty()) check_sums(p, write, pc);
    return;
  }
  if (options.preempt && random_bits() % options.preempt == 0) reschedule();
  access(running, p, bytes, write, place_of(pc), "");
}

#define CALLBACK(name, bytes, write) \
  void __tsan_##name(void* p) { on_access(p, bytes, write, __builtin_return_address(0)); }
#define CALLBACKS(bytes)                        \
  CALLBACK(read##bytes, bytes, false)           \
  CALLBACK(write##bytes, bytes, true)           \
  CALLBACK(unaligned_read##bytes, bytes, false) \
  CALLBACK(unaligned_write##bytes, bytes, true) \
  CALLBACK(volatile_read##bytes, bytes, false)  \
  CALLBACK(volatile_write##bytes, bytes, true)

extern "C" {
CALLBACKS(1)
CALLBACKS(2)
CALLBACKS(4)
CALLBACKS(8)
CALLBACKS(16)
void __tsan_read_range(void* p, size_t bytes) { on_access(p, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { on_access(p, bytes, true, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
