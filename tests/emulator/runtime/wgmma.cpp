// wgmma, a warp at a time: its 16 of the warpgroup's 64 rows. Operands are checked when a product is issued and count
// as read until the wait, where the sums come; until then the sums are NaN, and touching them is a fault.
#include <list>

#include "runtime.h"

namespace emulator {

namespace {
constexpr int ROWS = 16, DEPTH = 16, MAX_COLUMNS = 128;
constexpr uint32_t POISON = 0x7fffffff;  // NaN

struct PoisonedSums {
  float* d[32];  // of the lanes
  int count;     // per lane
  std::vector<float> values;
  int products;  // in flight
};
struct Product {
  Wgmma w;
  uint32_t a[32][4];
  float* d[32];
  PoisonedSums* sums;
  bool done;
};
struct Products {  // of a warp
  int agent = -1, issued = 0;
  bool fenced = false;
  uint32_t complete = 0;  // groups
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  std::list<PoisonedSums> sums;
};
struct Request {
  const Wgmma* w;
  float* d;
  Site site;
};
}  // namespace
static std::vector<Products> products;

void reset_products() { products.clear(); }

static Products& products_of(int warp) {
  products.resize(warps.size());
  return products[warp];
}

// ---- operands: pieces of 16 bytes, eight elements along a row of 128 bytes -----------------------------------

namespace {
struct Tile {
  uint32_t start, leading, stride;
  bool columns;

  Tile(uint64_t descriptor, bool by_columns, Site site)
      : start((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4),
        columns(by_columns) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7)) fault("wgmma", site, "no descriptor of tile_descriptor");
    // Rows along k may start within a row, at 16 of its 64 elements; what comes by columns is whole.
    if (columns ? start % 1024 : start % 1024 & ~0x60u)
      fault("misaligned", site, "wgmma operand at shared address %u, whose tile is at no multiple of 1024", start);
  }

  // body(piece, its row of the operand, its k): along k if by rows, along the operand's rows if by columns.
  template <class F>
  void each_piece(int first, int count, F body) const {
    if (columns) {
      for (int k = 0; k < DEPTH; k++) {
        for (int i = first; i < first + count; i += 8)
          body(start + i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128, i - first, k);
      }
    } else {
      for (int i = first; i < first + count; i++) {
        for (int k = 0; k < DEPTH; k += 8) body(start + i / 8 * stride + i % 8 * 128 + k * 2, i - first, k);
      }
    }
  }
};
}  // namespace

// One lane of each group that knows the same: what it may read, all of the group may.
static std::vector<Fiber*> readers(Fiber* const* lanes) {
  std::vector<Fiber*> some;
  for (int lane = 0; lane < 32; lane++) {
    if (!lane || (options.check && lanes[lane]->knows != some.back()->knows)) some.push_back(lanes[lane]);
  }
  return some;
}

static void check_operand(const Tile& tile, int first, int count, Moment when, const std::vector<Fiber*>& by,
                          Site site) {
  Place place = place_of(site);
  tile.each_piece(first, count, [&](uint32_t address, int, int) {
    const uint8_t* p = shared_window() + swizzled(address);
    if (!is_shared(p)) fault("out-of-bounds", site, "wgmma operand at shared address %u", address);
    for (Fiber* f : by) async_access(f, when, p, PIECE, false, place, "wgmma ");
  });
}

static float to_float(uint16_t x, MmaKind kind) {
  return kind == MMA_BF16 ? __uint_as_float((uint32_t)x << 16) : from_half(x);
}

// put(row of the operand, k, value)
template <class F>
static void each_element(const Tile& tile, int first, int count, MmaKind kind, F put) {
  tile.each_piece(first, count, [&](uint32_t address, int i, int k) {
    uint16_t x[8];
    memcpy(x, shared_window() + swizzled(address), PIECE);
    for (int e = 0; e < 8; e++) put(tile.columns ? i + e : i, tile.columns ? k : k + e, to_float(x[e], kind));
  });
}

// ---- the product: float sums in the order of k ----------------------------------------------------------------

static void multiply(const Product& product, int warp, Site site) {
  static float a[ROWS][DEPTH], b[DEPTH][MAX_COLUMNS], sums[ROWS][MAX_COLUMNS];
  const Wgmma& w = product.w;
  const int columns = 8 * w.tiles;
  if (w.a) {
    for (int lane = 0; lane < 32; lane++) {
      for (int i = 0; i < 8; i++) {
        int row = (lane >> 2) + (i >> 1 & 1) * 8, k = (lane & 3) * 2 + (i >> 2) * 8 + (i & 1);
        a[row][k] = to_float(product.a[lane][i >> 1] >> (16 * (i & 1)), w.kind);
      }
    }
  } else {
    each_element(Tile(w.a_tile, w.a_columns, site), warp % 4 * ROWS, ROWS, w.kind,
                 [&](int i, int k, float x) { a[i][k] = x; });
  }
  each_element(Tile(w.b_tile, w.b_columns, site), 0, columns, w.kind, [&](int j, int k, float x) { b[k][j] = x; });
  for (int i = 0; i < ROWS; i++) {
    std::fill_n(sums[i], columns, 0.0f);
    for (int k = 0; k < DEPTH; k++) {
      for (int j = 0; j < columns; j++) sums[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < 32; lane++) {
    for (int i = 0; i < 4 * w.tiles; i++) {
      float sum = sums[(lane >> 2) + (i >> 1 & 1) * 8][i / 4 * 8 + (lane & 3) * 2 + (i & 1)];
      float& d = product.d[lane][i];
      d = (w.accumulate ? d : 0.0f) + (w.negate ? -sum : sum);
    }
  }
}

// ---- issue ------------------------------------------------------------------------------------------------------

static PoisonedSums* poison(Products& mine, void** arguments, Fiber* const* lanes) {
  auto* first = (Request*)arguments[0];
  for (PoisonedSums& s : mine.sums) {
    if (s.d[0] == first->d) return &s;
  }
  mine.sums.emplace_back();
  PoisonedSums& s = mine.sums.back();
  s.count = 4 * first->w->tiles;
  s.products = 0;
  for (int lane = 0; lane < 32; lane++) {
    float* d = s.d[lane] = ((Request*)arguments[lane])->d;
    s.values.insert(s.values.end(), d, d + s.count);
    std::fill_n(d, s.count, __uint_as_float(POISON));
    if (options.check) lanes[lane]->sums_of_wgmma.push_back({d, d + s.count, place_of(first->site)});
  }
  return &s;
}

static void issue(void** arguments, unsigned) {
  const int warp = running->warp;
  Fiber* const* lanes = warps[warp].lanes;
  Products& mine = products_of(warp);
  auto* first = (Request*)arguments[0];
  const Wgmma& w = *first->w;
  Site site = first->site;
  if ((warp | 3) >= (int)warps.size() || !warps[warp | 3].exists)
    fault("divergence", site, "wgmma by fewer than the four warps of a warpgroup");
  if (!mine.fenced) fault("wgmma", site, "no wgmma_fence since the kernel's start or the last wgmma_wait");
  if (mine.agent < 0)
    mine.agent = new_agent("wgmma of warp " + std::to_string(running->index.warp) + of_block(*running->block));
  mine.issued++;
  Moment when = moment_of(mine.agent, mine.complete + mine.groups.size() + 1);
  std::vector<Fiber*> by = readers(lanes);
  if (!w.a) check_operand(Tile(w.a_tile, w.a_columns, site), warp % 4 * ROWS, ROWS, when, by, site);
  check_operand(Tile(w.b_tile, w.b_columns, site), 0, 8 * w.tiles, when, by, site);

  Product product{w, {}, {}, nullptr, w.at_once};
  if (!w.at_once) {
    product.sums = poison(mine, arguments, lanes);
    product.sums->products++;
  }
  for (int lane = 0; lane < 32; lane++) {
    auto* request = (Request*)arguments[lane];
    if (request->w->a_tile != w.a_tile || request->w->b_tile != w.b_tile || request->w->accumulate != w.accumulate)
      fault("divergence", site, "operands of wgmma differ between lanes 0 and %d", lane);
    if (w.a) memcpy(product.a[lane], request->w->a, sizeof product.a[lane]);
    product.d[lane] = w.at_once ? request->d : &product.sums->values[lane * product.sums->count];
  }
  if (w.at_once) multiply(product, warp, site);
  mine.open.push_back(product);
}

void wgmma(float* d, const Wgmma& w, Site site) {
  Request request{&w, d, site};
  warp_collective(30, ~0u, &request, issue, site);
}

void wgmma_fence(Site site) {
  warp_collective(31, ~0u, nullptr, [](void**, unsigned) { products_of(running->warp).fenced = true; }, site);
}

void wgmma_commit(Site site) {
  auto body = [](void**, unsigned) {
    Products& mine = products_of(running->warp);
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
  };
  warp_collective(32, ~0u, nullptr, body, site);
}

// ---- wait -------------------------------------------------------------------------------------------------------

static void give_back(Products& mine, PoisonedSums* sums, Fiber* const* lanes) {
  for (int lane = 0; lane < 32; lane++) {
    std::copy_n(&sums->values[lane * sums->count], sums->count, sums->d[lane]);
    auto& poisoned = lanes[lane]->sums_of_wgmma;
    auto is_it = [&](const Sums& s) { return s.low == sums->d[lane]; };
    poisoned.erase(std::remove_if(poisoned.begin(), poisoned.end(), is_it), poisoned.end());
  }
  mine.sums.remove_if([&](const PoisonedSums& s) { return &s == sums; });
}

struct Wait {
  int pending;
  Site site;
};

static void wait(void** arguments, unsigned) {
  const auto* wait = (Wait*)arguments[0];
  const int warp = running->warp;
  Fiber* const* lanes = warps[warp].lanes;
  Products& mine = products_of(warp);
  mine.fenced = false;
  while ((int)mine.groups.size() > wait->pending) {
    for (const Product& p : mine.groups.front()) {
      if (p.done) continue;
      multiply(p, warp, wait->site);
      if (--p.sums->products == 0) give_back(mine, p.sums, lanes);
    }
    mine.groups.pop_front();
    mine.complete++;
  }
  if (mine.agent < 0) return;
  learn_step(std::vector<Fiber*>(lanes, lanes + 32), mine.agent, mine.complete);
}

void wgmma_wait(int pending, Site site) {
  Wait argument{pending, site};
  warp_collective(33, ~0u, &argument, wait, site);
}

// ---- ends -------------------------------------------------------------------------------------------------------

void check_products_at_exit() {
  const Products& mine = products_of(running->warp);
  if (!mine.open.empty() || !mine.groups.empty())
    fault("async-hazard", (Place)0, "the thread exits without wgmma_wait for the wgmmas of its warp");
}

void check_products_at_end() {
  for (size_t warp = 0; warp < products.size(); warp++) {
    if (products[warp].issued != products[warp / 4 * 4].issued)
      fault("divergence", (Place)0,
            format("warps %d and %d of one warpgroup issued %d and %d wgmmas", warps[warp / 4 * 4].lanes[0]->index.warp,
                   warps[warp].lanes[0]->index.warp, products[warp / 4 * 4].issued, products[warp].issued));
  }
}
}  // namespace emulator
