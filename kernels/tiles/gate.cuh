// What gates of any size mean: g below -1000 counts as -1000, whose exponential is 0 like that of anything below. So
// -inf, of which no difference could be taken, forgets all.
#pragma once
#include "primitives/primitives.cuh"

PRIM float no_less_than_lowest(float g) { return g < -1000.0f ? -1000.0f : g; }  // NaN stays
