"""What a GPU of compute capability 9.0 does beside wgmma: clocks per operation, by one kernel each.

One or two warpgroups of a block multiply without pause; a third does one thing over and over. The
table gives the clocks that this thing takes beside none, one and two of them, and the clocks per
wgmma itself. What the design of `kernels/sm90/forward.cu` rests on: docs/performance.md.

    python benchmarks/hopper_rates.py
"""

from __future__ import annotations

import sys

import cupy
import numpy as np

from cupy_delta.commands.console import print_table
from cupy_delta.cuda.runtime.sources import kernel_folder

SOURCE = r"""
#include "primitives/hopper.cuh"

extern "C" __global__ void __launch_bounds__(384, 1)
    rate(float* out, long long* clocks, int multiplying) {
  DynSmem smem;
  bf16* tile = smem.take<bf16>(4096, "tile", 1024);
  float* f = smem.take<float>(4096, "floats", 1024);
  for (int i = threadIdx.x; i < 4096; i += 384) tile[i].bits = 0, f[i] = 0;
  async_proxy_fence();
  __syncthreads();
  const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
  if (warpgroup < 2) {
    if (warpgroup >= multiplying) return;
    uint32_t a[8][4] = {};
    float d[8][4] = {};
    const uint64_t b = tile_descriptor(tile, 16, 1024);
    const long long start = clock64();
    for (int r = 0; r < 400; r++) {
      pin(a);
      pin(d);
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < 8; s++)
        if (LEFT_IN_SHARED)
          wgmma<bf16, false, false>(d, b + s % 4 * 2, b + s % 4 * 2, true);
        else
          wgmma<bf16, false>(d, a[s], b + s % 4 * 2, true);
      wgmma_commit();
      wgmma_wait<0>();
      pin(d);
    }
    if (threadIdx.x == 0 && blockIdx.x == 0) clocks[1] = clock64() - start;
    out[threadIdx.x] = d[0][0];
    return;
  }
  float x[8], sums[4] = {};
  for (int i = 0; i < 8; i++) x[i] = out[lane + i];
  const uint32_t rows[4] = {1, 2, 3, 4};
  const long long start = clock64();
  for (int r = 0; r < 64; r++) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      OPERATION;
    }
  }
  if (threadIdx.x % 128 == 0 && blockIdx.x == 0) clocks[0] = clock64() - start;
  for (int i = 1; i < 8; i++) x[0] += x[i];
  out[threadIdx.x] = x[0] + sums[0] + f[lane];
}
"""
READ = "const float4 v = *(const float4*)&f[(lane * 4 + r * 4 + i * 128) & 4095];"
OPERATIONS = {
    "fused multiply-add": "x[i] = x[i] * x[7 - i] + 1.0f",
    "16 bytes per lane from shared memory": f"{READ} x[i] += v.x + v.y + v.z + v.w",
    "4 bytes per lane to shared memory": "f[(lane + r * 32 + i * 64) & 4095] = x[i]",
    "barrier of the warpgroup": "named_barrier(1, 128)",
    "mma.sync, each on the sum before": "mma_m16n8k8_tf32(sums, rows, 5, 6)",
}


def clocks(operation: str, left_in_shared: bool, multiplying: int) -> tuple[float, float]:
    """Return clocks per operation, and per wgmma of 64 x 64 x 16."""
    defines = f"#define OPERATION {operation}\n#define LEFT_IN_SHARED {int(left_in_shared)}\n"
    options = ("--std=c++17", f"-I{kernel_folder()}", "-arch=sm_90a")
    kernel = cupy.RawModule(code=defines + SOURCE, options=options).get_function("rate")
    out, measured = cupy.zeros(1024, cupy.float32), cupy.zeros(2, cupy.int64)
    blocks = cupy.cuda.Device().attributes["MultiProcessorCount"]
    for _ in range(2):
        arguments = (out, measured, np.int32(multiplying))
        kernel((blocks,), (384,), arguments, shared_mem=32 * 1024)
    operations, products = measured.get()
    return operations / 512, products / 3200


def main() -> int:
    if cupy.cuda.Device().compute_capability != "90":
        print("needs a GPU of compute capability 9.0", file=sys.stderr)
        return 1
    table = []
    for left_in_shared in (False, True):
        for name, operation in OPERATIONS.items():
            beside = [clocks(operation, left_in_shared, n) for n in (0, 1, 2)]
            left = "shared memory" if left_in_shared else "registers"
            cells = [f"{beside[n][0]:.1f}" for n in range(3)]
            table.append([left, name, *cells, f"{beside[1][1]:.1f}", f"{beside[2][1]:.1f}"])
    header = ["left operand of wgmma", "operation", "beside 0", "1", "2", "wgmma, 1", "2"]
    print_table(header, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
