// sample_rows.cu for rows whose sequences have grammars: see sample_masked.cu.
//
// Inputs, outputs, grid and alignment: sample_rows.cu. Twin: worker/cpu/sampler.py.
#define MASKED 1
#include "sample_rows.cu"
