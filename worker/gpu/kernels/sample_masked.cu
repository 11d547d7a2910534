// sample.cu for rows whose sequences have grammars. Ids that a row's mask does not allow have the
// score -inf. The launch follows that of sample.cu, which leaves such rows undrawn; it reads the
// same logits. If a row has no mask, nothing is written.
//
// Inputs, outputs, grid and alignment: sample.cu. Twin: worker/cpu/sampler.py.
#define MASKED 1
#include "sample.cu"
