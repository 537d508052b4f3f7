// What a walk over chunks needs to know of each token beside K, Q and V: beta, and what its gate does.
//
// In powers of two: G_i is the running sum of log2(e) g in the chunk, G_C its last one, and every token has a reference
// F_i. The walk holds rows of tokens in units of 2^(G_i - F_i),
//
//   R'_i = R_i / 2^(G_i - F_i)     N'_i = N_i / 2^(G_i - F_i)     O_i = 2^(G_i - F_i) O'_i
//
// so that the decay of what token i reads of token j becomes 2^(F_i - F_j). Where a chunk forgets at most RANGE, all
// F_i are one whole number F in the middle: there is no decay between tokens at all, S is in units of 2^F, and factors
// of rows, and of the state from one chunk's units to the next one's, have room in a float. Beyond, a token whose own
// G_i lies within RANGE keeps F, and the others have F_i = floor(G_i): a chunk that is "paired", since the decays
// between pairs of tokens have to be formed. S is in units of 2^(F_C), those of the last token. Tokens read it times
// 2^(F_i), in true units, and write to it times 2^(F_C - F_i); both are 2^F and 1 where all have the unit of the chunk.
//
// All F are whole, so that every factor between units is a power of two, which changes no rounding of normal numbers.
// Which F a token has follows from gates up to its own: so no output depends on a later gate by a single bit, unless a
// state below 2^-63 meets such a unit, or something overflows or is NaN, which may spread within its chunk.
//
// A gate counts for at least -FLOOR inside its chunk: what lies before it adds 2^-FLOOR of its size to what comes
// after. The state that leaves the chunk has of the one that entered it what the true gates leave, of -inf nothing.
//
// Numbers: sums in float, off by some 1e-5 within RANGE (at most 5e-5), and so are factors: a hundredth of what
// operands are rounded by. float16 has no room for factors of rows: all its gated chunks are paired.
#pragma once
#include "primitives/primitives.cuh"

constexpr float FLOOR = 41.0f, RANGE = IsHalf<DTYPE>::value ? -1.0f : 3 * FLOOR + 3.0f;

// What a gate does to the state over a chunk.
struct alignas(16) ChunkGates {
  float paired;  // 0 or 1
  float forget;  // of the state that enters, beyond what FLOOR lets be forgotten
  float carry;   // 2^(G_C - F_C), into true units
  float decay;   // e^(sum of g)
  float enter;   // 2^(F_C), from true units into this chunk's
  float unused[3];
};

// What is known of a chunk's tokens, in floats as the walk has it: factors of tokens by factor_place, then the chunk's
// own. Only a paired chunk has the rest.
constexpr int ROW_GAP = HAS_GATE ? 4 : 0;  // without a gate there is beta alone, and no room
constexpr int FACTOR_WORDS = CHUNK + ROW_GAP;
constexpr int BETA_AT = 0, DOWN_AT = FACTOR_WORDS,
              UP_AT = 2 * FACTOR_WORDS;  // beta; 2^(F_i - G_i); scale / that
constexpr int GATES_AT = 3 * FACTOR_WORDS, GATE_WORDS = 8;
constexpr int READS_AT = GATES_AT + GATE_WORDS, WRITES_AT = READS_AT + FACTOR_WORDS;       // 2^(F_i); 2^(F_C - F_i)
constexpr int REFERENCE_AT = WRITES_AT + FACTOR_WORDS, TOKENS_END = REFERENCE_AT + CHUNK;  // F_i, in their order

// Where the factor of a token lies, an even one's beside the next one's: the 16 that a thread needs of a product's
// columns are one row, quads of which lie in other banks than those of the other three rows.
PRIM int factor_row(int row) { return row * 16 + row / 2 * ROW_GAP; }
PRIM int factor_place(int token) { return factor_row(token % 8 / 2) + token / 8 * 2 + token % 2; }
// The factors of the columns that a thread, whose row begins at `at`, has of tiles 2 i (x and y) and 2 i + 1 (z and w).
PRIM float4 factor_quad(const float* factors, int at, int i) { return *(const float4*)&factors[at + 4 * i]; }
PRIM float2 factor_pair(const float* factors, int token) { return *(const float2*)&factors[factor_place(token)]; }

// The same as a record in global memory, (chunk slots, HV, RECORD_WORDS): without gaps between rows, so that sectors of
// 32 bytes are written whole. Three times a chunk's factors, its own, then what only a paired chunk has.
constexpr int RECORD_DOWN = CHUNK, RECORD_UP = 2 * CHUNK, RECORD_GATES = 3 * CHUNK;
constexpr int RECORD_HEAD = RECORD_GATES + GATE_WORDS;
constexpr int RECORD_READS = RECORD_HEAD, RECORD_WRITES = RECORD_READS + CHUNK;
constexpr int RECORD_REFERENCE = RECORD_WRITES + CHUNK, RECORD_WORDS = RECORD_REFERENCE + CHUNK;
// Value heads of a warp of sm90/gates.cu, and of a word of what it says of paired chunks.
constexpr int HEADS = 8;
// Gaps before the n-th sixteen bytes of rows of factors: one in the middle of 64 tokens.
PRIM int gaps_before(int n) { return (n + CHUNK / 8) / (CHUNK / 4); }
