// Memory, the lanes of a warp, barriers and the products of compute capability 8.0: what the runtime checks.
#include "addresses.h"
#include "prefetch_on_cpu.h"

namespace emulator {

enum Space { UNCHECKED, GENERIC, SHARED };  // parameters and local arrays; global or any; of the block

template <Space SPACE, class T, int N>
uint8_t* accessed(bool write, const uint16_t* x, const Step* s, Registers* r) {
  uint8_t* at = SPACE == SHARED ? shared_pointer(r, x) : generic_pointer(r, x);
  if (SPACE != UNCHECKED) memory_access(at, sizeof(T) * N, write, s->site());
  return at;
}
template <Space SPACE, class T, int N>
const Step* load(const Step* s, Registers* r) {
  T values[N];
  memcpy(values, accessed<SPACE, T, N>(false, s->x + N, s, r), sizeof values);
  put_all(r, s->x, values);
  return s + 1;
}
template <Space SPACE, class T, int N>
const Step* store(const Step* s, Registers* r) {
  T values[N];
  get_all(values, r, s->x + 2);
  memcpy(accessed<SPACE, T, N>(true, s->x, s, r), values, sizeof values);
  return s + 1;
}
template <Space SPACE, class T>
void accesses(Instructions& known, const std::string& space, const std::string& type) {
  known["ld" + space + type] = load<SPACE, T, 1>;
  known["ld" + space + ".v2" + type] = load<SPACE, T, 2>;
  known["ld" + space + ".v4" + type] = load<SPACE, T, 4>;
  known["st" + space + type] = store<SPACE, T, 1>;
  known["st" + space + ".v2" + type] = store<SPACE, T, 2>;
  known["st" + space + ".v4" + type] = store<SPACE, T, 4>;
}
template <Space SPACE>
void accesses(Instructions& known, const std::string& space) {
  for (const char* type : {".u8", ".b8"}) accesses<SPACE, uint8_t>(known, space, type);
  accesses<SPACE, int8_t>(known, space, ".s8");
  for (const char* type : {".u16", ".b16"}) accesses<SPACE, uint16_t>(known, space, type);
  accesses<SPACE, int16_t>(known, space, ".s16");
  for (const char* type : {".u32", ".s32", ".b32", ".f32"}) accesses<SPACE, uint32_t>(known, space, type);
  for (const char* type : {".u64", ".s64", ".b64", ".f64"}) accesses<SPACE, uint64_t>(known, space, type);
}
template <class T>
const Step* atomic_add(const Step* s, Registers* r) {
  auto* at = (T*)generic_pointer(r, s->x + 1);
  put(r, s->x[0], atomicAdd(at, get<T>(r, s->x[3]), s->file, s->line));
  return s + 1;
}

// shfl: what a lane gets and whether it is from a lane in range; c holds the segment mask (bits 8 to 12) and the clamp.
template <char MODE>
const Step* shuffle_lanes(const Step* s, Registers* r) {
  const uint32_t b = get<uint32_t>(r, s->x[3]), c = get<uint32_t>(r, s->x[4]), mask = get<uint32_t>(r, s->x[5]);
  int lane = current->lane, segment = c >> 8 & 31, clamp = c & 31, from = b & 31;
  int top = (lane & segment) | (clamp & ~segment), bottom = lane & segment;
  if (MODE == 'u') from = lane - from;
  if (MODE == 'd') from = lane + from;
  if (MODE == 'b') from = lane ^ from;
  if (MODE == 'i') from = bottom | (from & ~segment);
  const bool in_range = MODE == 'u' ? from >= top : from <= top;
  const uint32_t got = shuffle(mask, get<uint32_t>(r, s->x[2]), in_range ? from : lane, s->site());
  put(r, s->x[0], got);
  put(r, s->x[1], in_range);
  return s + 1;
}

static const Step* ask_ahead(const Step* s, Registers* r) {
  prefetch_line(generic_pointer(r, s->x), s->site());
  return s + 1;
}

static const Step* barrier(const Step* s, Registers* r) {
  block_barrier(get<int32_t>(r, s->x[0]), get<int32_t>(r, s->x[1]), s->site());
  return s + 1;
}
static const Step* barrier_of_warp(const Step* s, Registers* r) {
  warp_barrier(get<uint32_t>(r, s->x[0]), s->site());
  return s + 1;
}

static const Step* copy(const Step* s, Registers* r) {
  const int bytes = get<int32_t>(r, s->x[4]), valid = get<int32_t>(r, s->x[5]);
  cp_async(shared_pointer(r, s->x), generic_pointer(r, s->x + 2), bytes, valid, s->site());
  return s + 1;
}
static const Step* commit_copies(const Step* s, Registers*) {
  cp_async_commit(s->site());
  return s + 1;
}
static const Step* wait_for_copies(const Step* s, Registers* r) {
  cp_async_wait(get<int32_t>(r, s->x[0]), s->site());
  return s + 1;
}

template <bool TRANSPOSED>
const Step* load_matrix(const Step* s, Registers* r) {
  uint32_t values[4];
  ldmatrix(values, shared_pointer(r, s->x + 4), TRANSPOSED, s->site());
  put_all(r, s->x, values);
  return s + 1;
}
static const Step* transpose_matrix(const Step* s, Registers* r) {
  put(r, s->x[0], movmatrix(get<uint32_t>(r, s->x[1]), s->site()));
  return s + 1;
}
template <MmaKind KIND>
const Step* product(const Step* s, Registers* r) {
  float d[4];
  uint32_t a[4], b[2];
  get_all(a, r, s->x + 4);
  get_all(b, r, s->x + 8);
  get_all(d, r, s->x + 10);
  mma(d, a, b, KIND, s->site());
  put_all(r, s->x, d);
  return s + 1;
}

template <bool WHEN>
const Step* branch(const Step* s, Registers* r) {
  return s + (get<bool>(r, s->x[0]) == WHEN ? s->jump : 1);
}
static const Step* always(const Step* s, Registers*) { return s + s->jump; }
static const Step* leave(const Step*, Registers*) { return nullptr; }

void movement(Instructions& known) {
  accesses<UNCHECKED>(known, ".param");
  accesses<UNCHECKED>(known, ".local");
  accesses<GENERIC>(known, ".global");
  accesses<GENERIC>(known, "");
  accesses<SHARED>(known, ".shared");
  for (const char* type : {"u32", "s32"}) known[std::string("atom.global.add.") + type] = atomic_add<uint32_t>;
  known["atom.global.add.u64"] = atomic_add<uint64_t>;
  known["shfl.up.b32"] = shuffle_lanes<'u'>;
  known["shfl.down.b32"] = shuffle_lanes<'d'>;
  known["shfl.bfly.b32"] = shuffle_lanes<'b'>;
  known["shfl.idx.b32"] = shuffle_lanes<'i'>;
  known["prefetch.global.L2"] = ask_ahead;
  known["bar"] = barrier;
  known["bar.warp"] = barrier_of_warp;
  known["cp.async.shared.global"] = copy;
  known["cp.async.commit_group"] = commit_copies;
  known["cp.async.wait_group"] = wait_for_copies;
  known["ldmatrix.m8n8.x4.shared.b16"] = load_matrix<false>;
  known["ldmatrix.m8n8.x4.trans.shared.b16"] = load_matrix<true>;
  known["movmatrix.m8n8.trans.b16"] = transpose_matrix;
  known["mma.m16n8k16.row.col.f32.bf16.bf16.f32"] = product<MMA_BF16>;
  known["mma.m16n8k16.row.col.f32.f16.f16.f32"] = product<MMA_F16>;
  known["mma.m16n8k8.row.col.f32.tf32.tf32.f32"] = product<MMA_TF32>;
  known["bra"] = always;
  known["bra if"] = branch<true>;
  known["bra unless"] = branch<false>;
  known["ret"] = leave;
}
}  // namespace emulator
