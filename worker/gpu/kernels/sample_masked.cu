// sample.cu for a row whose sequence has a grammar. Ids that its mask does not allow have the score
// -inf. The launch follows that of sample.cu, which leaves such a row undrawn; it reads the same
// logits. If the row has no mask, nothing is written.
//
// Inputs, outputs, grid and alignment: sample.cu. Twin: worker/cpu/sampler.py.
#define MASKED 1
#include "sample.cu"
