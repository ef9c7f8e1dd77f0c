// A linear layer of a few rows against a large weight, as decoding has them: a row for each candidate.
//
// A product of a few rows is as fast as its weight can be read, if nothing else is in the way: BLAS packs the weight first,
// which costs as much as the product. Here the rows are packed (they are few), the lanes of a vector are rows, and the
// weight is read once, in its own order. An output's sum runs over the dimensions in order, whatever rows are beside it, on
// any number of threads.
#pragma once

#include <cstdint>

namespace ampo {

// out[r, n] = sum_d x[r, d] * weight[n, d] (+ bias[n], where there is one); all row-major float32
void few_rows_cpu(const float* x, int64_t num_rows, const float* weight, const float* bias, int64_t num_outputs, int64_t dim,
                  float* out);

}  // namespace ampo
