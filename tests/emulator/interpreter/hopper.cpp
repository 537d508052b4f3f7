// The instructions of compute capability 9.0, by the names that ptx_instructions.py gives them.
#include "addresses.h"

namespace emulator {

typedef uint8_t* Pointer(const Registers*, const uint16_t*);

static const Step* init_barrier(const Step* s, Registers* r) {
  mbarrier_init((uint64_t*)shared_pointer(r, s->x), get<int32_t>(r, s->x[2]), s->site());
  return s + 1;
}
template <Pointer POINTER>
const Step* arrive(const Step* s, Registers* r) {
  mbarrier_arrive((uint64_t*)POINTER(r, s->x), get<int32_t>(r, s->x[2]), s->site());
  return s + 1;
}
static const Step* wait_at_barrier(const Step* s, Registers* r) {  // and never gives up here
  mbarrier_wait((uint64_t*)shared_pointer(r, s->x + 1), get<int32_t>(r, s->x[3]), s->site());
  put(r, s->x[0], true);
  return s + 1;
}

static Coordinates coordinates(const Registers* r, const uint16_t* x) {
  int at[4];
  get_all(at, r, x);
  return {at[0], at[1], at[2], at[3]};
}
static const Step* load_box(const Step* s, Registers* r) {
  auto* map = (const void*)get<uint64_t>(r, s->x[2]);
  auto* barrier = (uint64_t*)shared_pointer(r, s->x + 7);
  tma_load(shared_pointer(r, s->x), map, barrier, coordinates(r, s->x + 3), s->site());
  return s + 1;
}
static const Step* store_box(const Step* s, Registers* r) {
  auto* map = (const void*)get<uint64_t>(r, s->x[0]);
  tma_store(map, shared_pointer(r, s->x + 5), coordinates(r, s->x + 1), s->site());
  return s + 1;
}
static const Step* commit_stores(const Step* s, Registers*) {
  tma_store_commit();
  return s + 1;
}
static const Step* wait_for_stores(const Step* s, Registers* r) {
  tma_store_wait_read(get<int32_t>(r, s->x[0]));
  return s + 1;
}
static const Step* send(const Step* s, Registers* r) {
  auto *to = cluster_pointer(r, s->x), *from = shared_pointer(r, s->x + 2);
  auto* barrier = (uint64_t*)cluster_pointer(r, s->x + 5);
  cluster_send(to, from, get<int32_t>(r, s->x[4]), barrier, s->site());
  return s + 1;
}
template <void (*FENCE)()>
const Step* fence(const Step* s, Registers*) {
  FENCE();
  return s + 1;
}
template <void (*AT)(Site)>
const Step* at_site(const Step* s, Registers*) {
  AT(s->site());
  return s + 1;
}
static const Step* map_to_rank(const Step* s, Registers* r) {
  put(r, s->x[0], map_shared(get<uint32_t>(r, s->x[1]), get<int32_t>(r, s->x[2]), s->site()));
  return s + 1;
}

template <bool TRANSPOSED>
const Step* store_matrix(const Step* s, Registers* r) {
  uint32_t values[4];
  get_all(values, r, s->x + 2);
  stmatrix(shared_pointer(r, s->x), values, TRANSPOSED, s->site());
  return s + 1;
}

static const Step* wait_for_products(const Step* s, Registers* r) {
  wgmma_wait(get<int32_t>(r, s->x[0]), s->site());
  return s + 1;
}
// d, a and b, whether to add to d; the sign of a and of b; whether a and b lie in columns. A is a tile or in registers,
// which have no columns.
template <MmaKind KIND, int TILES, bool REGISTERS>
const Step* warpgroup_product(const Step* s, Registers* r) {
  const uint16_t *to = s->x, *x = to + TILES * 4;
  float d[TILES * 4];
  uint32_t a[4] = {};
  get_all(d, r, to);
  if (REGISTERS) get_all(a, r, x);
  const uint64_t a_tile = REGISTERS ? 0 : get<uint64_t>(r, x[0]);
  x += REGISTERS ? 4 : 1;
  Wgmma w = {KIND, TILES, REGISTERS ? a : nullptr, a_tile, get<uint64_t>(r, x[0])};
  w.accumulate = get<bool>(r, x[1]);
  w.negate = get<int32_t>(r, x[2]) < 0;
  w.a_columns = !REGISTERS && get<bool>(r, x[4]);
  w.b_columns = get<bool>(r, x[REGISTERS ? 4 : 5]);
  w.at_once = true;
  wgmma(d, w, s->site());
  put_all(r, to, d);
  return s + 1;
}
template <MmaKind KIND, int TILES>
void products(Instructions& known, const std::string& shape) {
  known["wgmma " + shape + " tile"] = warpgroup_product<KIND, TILES, false>;
  known["wgmma " + shape + " registers"] = warpgroup_product<KIND, TILES, true>;
}

void hopper(Instructions& known) {
  known["mbarrier.init.shared::cta"] = init_barrier;
  for (const char* name : {"mbarrier.arrive.shared::", "mbarrier.arrive.expect_tx.shared::"}) {
    known[std::string(name) + "cta"] = arrive<shared_pointer>;
    known[std::string(name) + "cluster"] = arrive<cluster_pointer>;
  }
  known["mbarrier.try_wait.parity.shared::cta"] = wait_at_barrier;
  known["tma load"] = load_box;
  known["tma store"] = store_box;
  known["tma commit"] = commit_stores;
  known["tma wait"] = wait_for_stores;
  known["send"] = send;
  known["mapa"] = map_to_rank;
  known["cluster arrive"] = at_site<cluster_arrive>;
  known["cluster wait"] = at_site<cluster_wait>;
  known["mbarrier fence"] = fence<mbarrier_init_fence>;
  known["proxy fence"] = fence<async_proxy_fence>;
  known["stmatrix.m8n8.x4.shared.b16"] = store_matrix<false>;
  known["stmatrix.m8n8.x4.trans.shared.b16"] = store_matrix<true>;
  known["wgmma fence"] = at_site<wgmma_fence>;
  known["wgmma commit"] = at_site<wgmma_commit>;
  known["wgmma wait"] = wait_for_products;
  products<MMA_BF16, 4>(known, "n32 bf16");
  products<MMA_BF16, 8>(known, "n64 bf16");
  products<MMA_BF16, 16>(known, "n128 bf16");
  products<MMA_F16, 4>(known, "n32 f16");
  products<MMA_F16, 8>(known, "n64 f16");
  products<MMA_F16, 16>(known, "n128 f16");
}
}  // namespace emulator
