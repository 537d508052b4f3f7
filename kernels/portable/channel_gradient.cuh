// The gradients of q, k and a gate per key channel from what comes back to their products, for backward_channel.cu.
//
// A product of tokens i >= j holds g_t exactly when i >= t > j. The state that enters a chunk stands for a token before
// its first, and the gradient of the one that leaves for a token after its last. For a channel, with a the block of
// token t, and Z_ij the products, decays included, times what comes back to them,
//
//   dg_t = sum of Z_ij over i in a, i >= t and all j < t,  over i after a and j in a, j < t,  and over i after, j
//   before a
//
// Every term holds e^(g_t) itself, so none is large where their sum is small, and dg is 0 for g = -inf.
//
// A thread has a channel and a block of 16 tokens. What comes to its tokens from earlier ones is gathered block by
// block, decayed from each to the next (Horner's rule), and so is what comes from later ones; its own pairs go through
// the decays one by one. Sums over the products of whole blocks, for the third term, go through shared memory.
//
// Numbers: float. Macros: DTYPE, CHUNK, KEYS (channels of a block of threads).
#pragma once
#include "tiles/channel_decay.cuh"

constexpr int K_PITCH = pitch_of<DTYPE>(KEYS), X_PITCH = pitch_of<float>(KEYS), PAIR_PITCH = CHUNK + 2;
constexpr int UNITS = BLOCKS_OF_CHUNK * KEYS;

// Sixteen tokens of a thread's channel.
typedef float Rows[BLOCK];

struct Channels {
  DTYPE *q, *k;
  float* e;                           // e^g
  float2* sums;                       // of the gates of every block
  float* decays;                      // their exponentials
  float *through, *written, *states;  // per unit: sums over products of blocks
  // In the place of tiles that are read no more:
  float *from_q, *from_k, *from_n;  // scale dO S^T, -dR S^T, N dS'^T
  float2* pairs;  // (scale dPqk, E): [i][j] where i is in a later block than j, and [j][i] for i >= j as well

  // Where the sums of block a's products go that have their other token, or the state, before block b < a.
  PRIM float& through_of(int a, int b, int c) const { return through[(a * (a - 1) / 2 + b) * KEYS + c]; }
  PRIM float e_of(int token, int c) const { return e[token * X_PITCH + c]; }
  PRIM float k_of(int token, int c) const { return widen(k[token * K_PITCH + c]); }
  PRIM float q_of(int token, int c) const { return widen(q[token * K_PITCH + c]); }
};

// A thread's tokens, and their gradients.
struct Unit {
  int a, c;
  Rows q, k, e;
  Rows dg;

  PRIM void load(const Channels& s) {
#pragma unroll
    for (int i = 0; i < BLOCK; i++) {
      const int token = a * BLOCK + i;
      q[i] = s.q_of(token, c), k[i] = s.k_of(token, c), e[i] = s.e_of(token, c);
    }
  }

  // sum over i of what comes to q_i and k_i, decayed from the start of the block, times these.
  PRIM float product_of_reads(const Rows& to_q, const Rows& to_k) const {
    float sum = 0.0f, f = 1.0f;
#pragma unroll
    for (int i = 0; i < BLOCK; i++) {
      f *= e[i];
      sum += f * (q[i] * to_q[i] + k[i] * to_k[i]);
    }
    return sum;
  }

  // What comes from the state and from earlier blocks.
  PRIM void from_before(const Channels& s, Rows& dq, Rows& dk) {
    Rows to_q, to_k;
    gather_before(s, to_q, to_k);
    add_before(to_q, to_k, dq, dk);
  }
  PRIM void gather_before(const Channels& s, Rows& to_q, Rows& to_k) const {
#pragma unroll
    for (int i = 0; i < BLOCK; i++) {
      const int at = (a * BLOCK + i) * X_PITCH + c;
      to_q[i] = s.from_q[at], to_k[i] = s.from_k[at];
    }
#pragma unroll 1
    for (int b = 0; CHUNK > BLOCK && b < a; b++) {
      float later = 1.0f;
#pragma unroll 1
      for (int x = b; x < a; x++) later *= s.decays[x * KEYS + c];
      s.through_of(a, b, c) = later * product_of_reads(to_q, to_k);
      const float block = s.decays[b * KEYS + c];
#pragma unroll
      for (int i = 0; i < BLOCK; i++) to_q[i] *= block, to_k[i] *= block;
      float f = 1.0f;
#pragma unroll 1
      for (int j = (b + 1) * BLOCK - 1; j >= b * BLOCK; j--) {
        const float y = f * s.k_of(j, c);
        f *= s.e_of(j, c);
        const float4* pairs = (const float4*)&s.pairs[j * PAIR_PITCH + a * BLOCK];
#pragma unroll
        for (int i = 0; i < BLOCK; i += 2) {
          const float4 two = pairs[i / 2];
          to_q[i] += two.x * y, to_k[i] += two.y * y;
          to_q[i + 1] += two.z * y, to_k[i + 1] += two.w * y;
        }
      }
    }
  }
  PRIM void add_before(const Rows& to_q, const Rows& to_k, Rows& dq, Rows& dk) {
    float f = 1.0f;
#pragma unroll
    for (int i = 0; i < BLOCK; i++) {
      f *= e[i];
      const float x = f * to_q[i], y = f * to_k[i];
      dq[i] += x, dk[i] += y;
      dg[i] = q[i] * x + k[i] * y;
    }
#pragma unroll
    for (int i = BLOCK - 2; i >= 0; i--) dg[i] += dg[i + 1];
  }

  // sum over j of what comes to k_j, decayed up to the end of the block, times k_j.
  PRIM float product_of_writes(const Rows& to_k) const {
    float sum = 0.0f, f = 1.0f;
#pragma unroll
    for (int j = BLOCK - 1; j >= 0; j--) {
      sum += f * k[j] * to_k[j];
      f *= e[j];
    }
    return sum;
  }

  // What comes from the leaving state's gradient and from later blocks.
  PRIM void from_behind(const Channels& s, Rows& dk) {
    Rows to_k;
    gather_behind(s, to_k);
    add_behind(to_k, dk);
  }
  PRIM void gather_behind(const Channels& s, Rows& to_k) const {
    float later = 1.0f;
#pragma unroll
    for (int j = 0; j < BLOCK; j++) to_k[j] = s.from_n[(a * BLOCK + j) * X_PITCH + c];
#pragma unroll 1
    for (int b = a + 1; b < BLOCKS_OF_CHUNK; b++) later *= s.decays[b * KEYS + c];
    s.written[a * KEYS + c] = later * product_of_writes(to_k);
#pragma unroll 1
    for (int b = BLOCKS_OF_CHUNK - 1; b > a; b--) {
      const float block = s.decays[b * KEYS + c];
#pragma unroll
      for (int j = 0; j < BLOCK; j++) to_k[j] *= block;
      float f = 1.0f;
#pragma unroll 1
      for (int i = b * BLOCK; i < (b + 1) * BLOCK; i++) {
        f *= s.e_of(i, c);
        const float x = f * s.q_of(i, c), y = f * s.k_of(i, c);
        const float4* pairs = (const float4*)&s.pairs[i * PAIR_PITCH + a * BLOCK];
#pragma unroll
        for (int j = 0; j < BLOCK; j += 2) {
          const float4 two = pairs[j / 2];
          to_k[j] += two.x * x + two.y * y;
          to_k[j + 1] += two.z * x + two.w * y;
        }
      }
    }
  }
  PRIM void add_behind(const Rows& to_k, Rows& dk) {
    float f = 1.0f;
    Rows early;
#pragma unroll
    for (int j = BLOCK - 1; j >= 0; j--) {
      const float x = f * to_k[j];
      dk[j] += x;
      early[j] = k[j] * x;
      f *= e[j];
    }
    float before = 0.0f;
#pragma unroll
    for (int t = 0; t < BLOCK; t++) dg[t] += before, before += early[t];
  }

  // The pairs of the block itself, column after column: y_i = k_j e^(G_i - G_j) downwards, and what comes back upwards.
  // `own` pairs are [j][i].
  PRIM void within(const float2* own, int pitch, Rows& dq, Rows& dk) {
#pragma unroll
    for (int j = 0; j < BLOCK; j++) {
      const float2* pairs = &own[j * pitch];
      const float diagonal = pairs[j].x;
      dq[j] += diagonal * k[j];
      dk[j] += diagonal * q[j];
      Rows y;
      y[j] = k[j];
#pragma unroll
      for (int i = j + 1; i < BLOCK; i++) {
        y[i] = e[i] * y[i - 1];
        dq[i] += pairs[i].x * y[i];
        dk[i] += pairs[i].y * y[i];
      }
      float back = 0.0f;
#pragma unroll
      for (int i = BLOCK - 1; i > j; i--) {
        back = e[i] * (back + pairs[i].x * q[i] + pairs[i].y * k[i]);
        dg[i] += back * y[i - 1];
      }
      dk[j] += back;
    }
  }

  // What products of earlier and later blocks, and of states, are to every gate of this one.
  PRIM void add_through(const Channels& s) {
    float sum = 0.0f;
#pragma unroll 1
    for (int b = 0; b < BLOCKS_OF_CHUNK; b++) {
      sum += s.states[b * KEYS + c];
      if (b < a) sum += s.written[b * KEYS + c];
      if (CHUNK > BLOCK && b > a) sum += s.through_of(b, a, c);
    }
#pragma unroll
    for (int t = 0; t < BLOCK; t++) dg[t] += sum;
  }
};
