// Parameters of glu.cu and glu_rows.cu. Python: `_BRANCH`, `_HIDDEN` in worker/gpu/matvec.py.
#pragma once
#include "q8_activations.cuh"

struct Branch {
    Planes planes;
    const float* bias;
};

struct Hidden {  // rows of h, as f32 and as Q8 blocks
    float* x;
    u8* q;
    Meta* meta;
};
