// One warp that runs every matrix and conversion primitive once and writes what it got: run on a GPU it gives the
// golden file that the emulator's results are compared with.
//
// Grid: 1 block of 32 threads. Shared memory: a tile of 16 x 24 16-bit elements and 32 floats.
#include "primitives/primitives.cuh"

template <class T>
PRIM void matrix_results(const uint16_t* elements, float* products, uint32_t* words, bf16* tile, int lane) {
  for (int i = lane; i < 16 * 16; i += 32) tile[i / 16 * 24 + i % 16].bits = elements[i];
  __syncwarp();
  uint32_t a[4], b[4];
  ldmatrix_x4(a, &tile[lane % 16 * 24 + lane / 16 * 8]);
  ldmatrix_x4_trans(b, &tile[lane % 16 * 24 + lane / 16 * 8]);
  float d[4] = {};
  mma_m16n8k16<T>(d, a, b[0], b[1]);
  for (int i = 0; i < 4; i++) {
    products[i * 32 + lane] = d[i];
    words[i * 32 + lane] = a[i];
    words[(4 + i) * 32 + lane] = b[i];
    words[(8 + i) * 32 + lane] = movmatrix_trans(a[i]);
  }
  __syncwarp();
}

extern "C" __global__ void __launch_bounds__(32)
    primitives(const uint16_t* elements, const uint16_t* half_elements, const float* numbers, const float* factors,
               float* products, uint32_t* words, float* tf32_products, uint32_t* conversions, float* copied) {
  const int lane = threadIdx.x;
  DynSmem smem;
  bf16* tile = smem.take<bf16>(16 * 24, "tile");
  float* row = smem.take<float>(32, "row");
  matrix_results<bf16>(elements, products, words, tile, lane);
  matrix_results<f16>(half_elements, products + 128, words + 384, tile, lane);

  uint32_t a[4];
  for (int i = 0; i < 4; i++) a[i] = to_tf32(factors[i * 32 + lane]);
  float d[4] = {};
  mma_m16n8k8_tf32(d, a, to_tf32(factors[128 + lane]), to_tf32(factors[160 + lane]));
  for (int i = 0; i < 4; i++) tf32_products[i * 32 + lane] = d[i];

  for (int i = 0; i < 6; i++) {
    const float x = numbers[i * 32 + lane], y = numbers[(5 - i) * 32 + lane];
    conversions[(4 * i + 0) * 32 + lane] = pack2<bf16>(x, y);
    conversions[(4 * i + 1) * 32 + lane] = pack2<f16>(x, y);
    conversions[(4 * i + 2) * 32 + lane] = to_tf32(x);
    conversions[(4 * i + 3) * 32 + lane] = narrow<bf16>(x).bits | (uint32_t)narrow<f16>(y).bits << 16;
  }
  // A copy of 4 bytes per lane, every third of them zero-filled.
  cp_async<4>(&row[lane], &numbers[lane], lane % 3 ? 4 : 0);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  copied[lane] = row[31 - lane];
}
