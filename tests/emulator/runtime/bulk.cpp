// TMA: boxes of arrays copied between global and swizzled shared memory, and bytes between the shared memories of a
// cluster, beside the threads.
#include <variant>

#include "runtime.h"

namespace emulator {

namespace {
constexpr int LONGEST_ROW = 128;  // bytes of a swizzled row
constexpr uint64_t MAGIC = 0x70616d726f736e74;

// What tensor_map.py encodes: an array and the box to copy, innermost axis first.
struct Map {
  uint64_t magic;
  uint8_t* base;
  uint64_t pitches[3];  // bytes, of axes 1 to 3
  int32_t sizes[4], box[4];
  int32_t element;  // bytes

  int row() const { return box[0] * element; }
  int bytes() const { return box[0] * box[1] * box[2] * box[3] * element; }
};
struct Box {
  Map map;
  Coordinates at;
  uint8_t* shared;
};
struct Load {
  Box box;
  uint64_t* barrier;
  Place place;
};
struct Send {
  void* to;
  const void* from;
  int bytes;
  uint64_t* barrier;
  Place place;
};
struct Store {
  Box box;
  bool done;
};
struct Stores {  // of a thread
  int agent;
  uint32_t complete = 0;  // groups
  std::vector<Store> open;
  std::deque<std::vector<Store>> groups;
};
}  // namespace
static std::deque<std::variant<Load, Send>> copies;  // in flight
static std::map<int, Stores> stores;

void reset_bulk_copies() {
  copies.clear();
  stores.clear();
}

static Box make_box(const void* map, Coordinates at, const void* shared, Site site) {
  Box box;
  memcpy((void*)&box.map, map, sizeof box.map);
  if (box.map.magic != MAGIC) fault("bad-address", site, "no tensor map");
  box.at = at;
  box.shared = (uint8_t*)shared;
  uint32_t address = shared_address(shared, site);
  const uint32_t period = 8 * box.map.row();
  if (address % period) fault("misaligned", site, "tile at shared address %u, no multiple of %u", address, period);
  return box;
}

// The part of a row that lies in the array: bytes [low, high) of the row, from `global` on.
struct Part {
  uint8_t* global;
  int low, high;
};

// body(bytes before the row in shared memory, what of it is in the array)
template <class F>
static void each_row(const Box& box, F body) {
  const Map& m = box.map;
  int at = 0;
  for (int w = box.at.w; w < box.at.w + m.box[3]; w++) {
    for (int z = box.at.z; z < box.at.z + m.box[2]; z++) {
      for (int y = box.at.y; y < box.at.y + m.box[1]; y++, at += m.row()) {
        bool inside = y >= 0 && y < m.sizes[1] && z >= 0 && z < m.sizes[2] && w >= 0 && w < m.sizes[3];
        int low = std::min(std::max(-box.at.x, 0), m.box[0]), high = std::min(m.box[0], m.sizes[0] - box.at.x);
        if (!inside || low >= high) {
          body(at, Part{nullptr, 0, 0});
          continue;
        }
        uint8_t* row = m.base + y * m.pitches[0] + z * m.pitches[1] + w * m.pitches[2];
        body(at, Part{row + (box.at.x + low) * m.element, low * m.element, high * m.element});
      }
    }
  }
}

// The i-th piece of the row that begins `at` bytes after the box.
static uint8_t* piece(const Box& box, int at, int i) {
  uint8_t* p = box.shared + at + i * PIECE;
  return p - (uintptr_t)p % SHARED_WINDOW + swizzled((uintptr_t)p % SHARED_WINDOW, box.map.row());
}

// ---- loads and sends: complete late, when nobody else can run, or early, or when chance wills ----------------

static void perform(const Load& load) {
  each_row(load.box, [&](int at, Part part) {
    uint8_t row[LONGEST_ROW] = {};
    if (part.global) memcpy(row + part.low, part.global, part.high - part.low);
    for (int i = 0; i < load.box.map.row() / PIECE; i++) memcpy(piece(load.box, at, i), row + i * PIECE, PIECE);
  });
  complete_copy(load.barrier, load.box.map.bytes(), load.place);
}

static void perform(const Send& send) {
  memcpy(send.to, send.from, send.bytes);
  complete_copy(send.barrier, send.bytes, send.place);
}

static bool early() { return options.completion == EARLY || (options.completion == EITHER && random_bits() & 1); }

template <class Copy>
static void start(const Copy& copy) {
  if (early())
    perform(copy);
  else
    copies.push_back(copy);
}

void tma_load(void* to, const void* map, uint64_t* barrier, Coordinates at, Site site) {
  Place place = place_of(site);
  Load load{make_box(map, at, to, site), barrier, place};
  each_row(load.box, [&](int, Part part) {
    if (part.global) access(running, part.global, part.high - part.low, false, place, "tma_load ");
  });
  Moment when = begin_copy(barrier, site);
  async_access(running, when, to, load.box.map.bytes(), true, place, "tma_load ");
  memset(to, 0xff, load.box.map.bytes());
  start(load);
}

void cluster_send(void* to, const void* from, int bytes, uint64_t* barrier, Site site) {
  Place place = place_of(site);
  if (bytes <= 0 || bytes % 16) fault("misaligned", site, "cluster_send of %d bytes, no multiple of 16", bytes);
  if ((uintptr_t)to % 16 || shared_address(from, site) % 16)
    fault("misaligned", site, "cluster_send from %s to %s, expected multiples of 16", locate((uintptr_t)from).c_str(),
          locate((uintptr_t)to).c_str());
  Block& block = block_of(to, site);
  if (&block != &block_of(barrier, site)) fault("cluster", site, "a copy and its mbarrier in different blocks");
  Moment when = begin_copy(barrier, site);
  use_until(when, block, site, "cluster_send");
  use_until(when, *running->block, site, "cluster_send");
  async_access(running, when, to, bytes, true, place, "cluster_send ");
  async_access(running, when, from, bytes, false, place, "cluster_send ");
  memset(to, 0xff, bytes);
  start(Send{to, from, bytes, barrier, place});
}

bool complete_a_load() {
  if (copies.empty()) return false;
  auto next = copies.begin();
  if (options.completion == EITHER) next += random_bits() % copies.size();
  auto copy = *next;
  copies.erase(next);
  std::visit([](const auto& c) { perform(c); }, copy);
  return true;
}

void complete_some_loads() {
  if (options.completion == EITHER && !copies.empty() && random_bits() % 8 == 0) complete_a_load();
}

// ---- stores: read shared memory until the wait --------------------------------------------------------------

static Stores& stores_of(Fiber* f) {
  auto [entry, is_new] = stores.try_emplace(f->number);
  if (is_new) entry->second.agent = new_agent("tma_store of " + who(moment_of(f)));
  return entry->second;
}

static void perform(const Box& box) {
  each_row(box, [&](int at, Part part) {
    if (!part.global) return;
    uint8_t row[LONGEST_ROW];
    for (int i = 0; i < box.map.row() / PIECE; i++) memcpy(row + i * PIECE, piece(box, at, i), PIECE);
    memcpy(part.global, row + part.low, part.high - part.low);
  });
}

void tma_store(const void* map, const void* from, Coordinates at, Site site) {
  constexpr uint32_t NEVER = ~0u;  // no wait of this launch makes what it writes visible
  Place place = place_of(site);
  Box box = make_box(map, at, from, site);
  // Loads may begin before an array. Stores that do are an illegal instruction to an H200.
  if (std::min({at.x, at.y, at.z, at.w}) < 0)
    fault("out-of-bounds", site, "tma_store at (%d, %d, %d, %d), before the array", at.x, at.y, at.z, at.w);
  Stores& mine = stores_of(running);
  Moment read = moment_of(mine.agent, mine.complete + mine.groups.size() + 1);
  async_access(running, read, from, box.map.bytes(), false, place, "tma_store ");
  each_row(box, [&](int, Part part) {
    Moment written = moment_of(mine.agent, NEVER);
    if (part.global) async_access(running, written, part.global, part.high - part.low, true, place, "tma_store ");
  });
  bool done = early();
  if (done) perform(box);
  mine.open.push_back({box, done});
}

void tma_store_commit() {
  Stores& mine = stores_of(running);
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void tma_store_wait_read(int pending) {
  Stores& mine = stores_of(running);
  while ((int)mine.groups.size() > pending) {
    for (const Store& s : mine.groups.front()) {
      if (!s.done) perform(s.box);
    }
    mine.groups.pop_front();
    mine.complete++;
  }
  learn_step({running}, mine.agent, mine.complete);
}

void check_stores_at_exit() {
  auto found = stores.find(running->number);
  if (found == stores.end()) return;
  const Stores& mine = found->second;
  if (!mine.open.empty() || !mine.groups.empty())
    fault("async-hazard", (Place)0, "the thread exits while a tma_store of its reads shared memory");
}
}  // namespace emulator
