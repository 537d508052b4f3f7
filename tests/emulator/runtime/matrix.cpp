// Asynchronous copies and the matrix instructions of a warp.
#include "runtime.h"

namespace emulator {

// ---- cp.async: the target is unreadable from the copy to its owner's wait ------------------------------------

static void perform(const Copy& c) {
  memcpy(c.to, c.from, c.valid);
  memset((uint8_t*)c.to + c.valid, 0, c.bytes - c.valid);
}

void cp_async(void* to, const void* from, int bytes, int valid, Site site) {
  Place place = place_of(site);
  if (!is_shared(to)) fault("bad-address", site, "cp.async to memory that is not shared");
  if ((uintptr_t)to % bytes || (uintptr_t)from % bytes)
    fault("misaligned", site, "cp.async of %d bytes from %p to %p", bytes, from, to);
  if (valid < 0 || valid > bytes) fault("out-of-bounds", site, "cp.async of %d valid bytes out of %d", valid, bytes);
  if (valid) access(running, from, valid, false, place, "cp.async ");
  access(running, to, bytes, true, place, "cp.async ");
  Copy copy{to, from, bytes, valid};
  bool early = options.completion == EARLY || (options.completion == EITHER && random_bits() & 1);
  if (early)
    perform(copy);
  else
    memset(to, 0xff, bytes);
  mark_copy(to, bytes, true, place);
  running->open_group.push_back(copy);
}

void cp_async_commit(Site) {
  running->groups.push_back(std::move(running->open_group));
  running->open_group.clear();
}

void cp_async_wait(int pending, Site) {
  Fiber* f = running;
  while ((int)f->groups.size() > pending) {
    for (const Copy& c : f->groups.front()) {
      perform(c);
      mark_copy(c.to, c.bytes, false, 0);
    }
    f->groups.pop_front();
  }
}

// ---- ldmatrix: lane l receives elements (l / 4, 2 (l % 4)) and the next of each tile -----------------------

struct Matrices {
  const void* row;
  uint32_t* r;
  Site site;
};

template <bool TRANSPOSED>
static void ldmatrix_body(void** arguments, unsigned) {
  auto load = [&](int lane) { return (Matrices*)arguments[lane]; };
  uint16_t tile[4][8][8];
  for (int tile_number = 0; tile_number < 4; tile_number++) {
    int hits[8] = {}, worst = 1;  // eight rows of 16 bytes: one per group of four banks, or a conflict
    for (int i = 0; i < 8; i++) {
      const void* row = load(tile_number * 8 + i)->row;
      memcpy(tile[tile_number][i], row, 16);
      worst = std::max(worst, ++hits[(uintptr_t)row >> 4 & 7]);
    }
    statistics.ldmatrix_phases++;
    statistics.ldmatrix_conflicts += worst - 1;
  }
  Place place = place_of(load(0)->site);
  for (int lane = 0; lane < 32; lane++) {
    int r = lane >> 2, c = (lane & 3) * 2;
    Fiber* f = warp_of(running).lanes[lane];
    for (int t = 0; t < 4; t++) {
      // Charged to the lane that receives the data: so a missing __syncwarp shows.
      for (int half = 0; half < 2; half++) {
        const Matrices* from = load(t * 8 + (TRANSPOSED ? c + half : r));
        const void* p = (const uint16_t*)from->row + (TRANSPOSED ? r : c + half);
        access(f, p, 2, false, place, "ldmatrix ");
      }
      uint16_t low = TRANSPOSED ? tile[t][c][r] : tile[t][r][c];
      uint16_t high = TRANSPOSED ? tile[t][c + 1][r] : tile[t][r][c + 1];
      load(lane)->r[t] = low | (uint32_t)high << 16;
    }
  }
}

void ldmatrix(uint32_t* r, const void* row, bool transposed, Site site) {
  if (!is_shared(row)) fault("bad-address", site, "ldmatrix of memory that is not shared");
  if ((uintptr_t)row % 16) fault("misaligned", site, "ldmatrix row at %p, no multiple of 16", row);
  Matrices load{row, r, site};
  warp_collective(transposed ? 11 : 10, ~0u, &load, transposed ? ldmatrix_body<true> : ldmatrix_body<false>, site);
}

// ---- stmatrix: lane l has what ldmatrix would give it --------------------------------------------------------

template <bool TRANSPOSED>
static void stmatrix_body(void** arguments, unsigned) {
  auto store = [&](int lane) { return (Matrices*)arguments[lane]; };
  Place place = place_of(store(0)->site);
  for (int lane = 0; lane < 32; lane++) {
    int r = lane >> 2, c = (lane & 3) * 2;
    Fiber* f = warp_of(running).lanes[lane];
    for (int t = 0; t < 4; t++) {
      for (int half = 0; half < 2; half++) {
        uint16_t x = store(lane)->r[t] >> (16 * half);
        auto* row = (uint16_t*)store(t * 8 + (TRANSPOSED ? c + half : r))->row;
        uint16_t* p = row + (TRANSPOSED ? r : c + half);
        access(f, p, 2, true, place, "stmatrix ");
        *p = x;
      }
    }
  }
}

void stmatrix(void* row, const uint32_t* r, bool transposed, Site site) {
  if (shared_address(row, site) % 16) fault("misaligned", site, "stmatrix row at %p, no multiple of 16", row);
  Matrices store{row, (uint32_t*)r, site};
  warp_collective(transposed ? 14 : 13, ~0u, &store, transposed ? stmatrix_body<true> : stmatrix_body<false>, site);
}

// ---- numbers that a warp shares ------------------------------------------------------------------------------

void check_uniform(int mine, int first, Site site) {
  if (mine != first) fault("divergence", site, "uniform of %d, and of %d in lane 0", mine, first);
}

static void movmatrix_body(void** arguments, unsigned) {
  uint16_t tile[8][8];
  for (int lane = 0; lane < 32; lane++) memcpy(&tile[lane >> 2][(lane & 3) * 2], arguments[lane], 4);
  for (int lane = 0; lane < 32; lane++) {
    int r = lane >> 2, c = (lane & 3) * 2;
    *(uint32_t*)arguments[lane] = tile[c][r] | (uint32_t)tile[c + 1][r] << 16;
  }
}

uint32_t movmatrix(uint32_t x, Site site) {
  warp_collective(12, ~0u, &x, movmatrix_body, site);
  return x;
}

// ---- mma: m16n8, float sums in the order of k ------------------------------------------------------------------

struct Mma {
  float* d;
  const uint32_t *a, *b;
};

float from_half(uint16_t x) {
  uint32_t magnitude = (uint32_t)(x & 0x7fff) << 13, sign = (uint32_t)(x & 0x8000) << 16;
  if (magnitude >= 0x7c00 << 13) return __uint_as_float(sign | 0x7f800000 | magnitude);
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude) * 0x1p112f));  // the exponent's new bias
}

template <MmaKind KIND>
static float element(uint32_t packed, int half) {
  if (KIND == MMA_TF32) return __uint_as_float(packed & ~0x1fffu);  // the hardware ignores the low 13 bits
  uint16_t x = packed >> (16 * half);
  return KIND == MMA_BF16 ? __uint_as_float((uint32_t)x << 16) : from_half(x);
}

template <MmaKind KIND>
static void mma_body(void** arguments, unsigned) {
  constexpr int PER_REGISTER = KIND == MMA_TF32 ? 1 : 2, DEPTH = 8 * PER_REGISTER;
  float a[16][DEPTH], b[DEPTH][8];
  for (int lane = 0; lane < 32; lane++) {
    const Mma* m = (Mma*)arguments[lane];
    int group = lane >> 2, k = (lane & 3) * PER_REGISTER;
    for (int h = 0; h < PER_REGISTER; h++) {
      for (int i = 0; i < 4; i++) a[group + (i & 1) * 8][k + (i >> 1) * DEPTH / 2 + h] = element<KIND>(m->a[i], h);
      for (int i = 0; i < 2; i++) b[k + i * DEPTH / 2 + h][group] = element<KIND>(m->b[i], h);
    }
  }
  for (int lane = 0; lane < 32; lane++) {
    Mma* m = (Mma*)arguments[lane];
    for (int i = 0; i < 4; i++) {
      int row = (lane >> 2) + (i >> 1) * 8, column = (lane & 3) * 2 + (i & 1);
      float sum = 0;
      for (int k = 0; k < DEPTH; k++) sum += a[row][k] * b[k][column];
      m->d[i] += sum;
    }
  }
}

void mma(float* d, const uint32_t* a, const uint32_t* b, MmaKind kind, Site site) {
  static const Collective bodies[] = {mma_body<MMA_BF16>, mma_body<MMA_F16>, mma_body<MMA_TF32>};
  Mma m{d, a, b};
  warp_collective(20 + kind, ~0u, &m, bodies[kind], site);
}
}  // namespace emulator
