// Means under a softmax on the CPU, and the merging of states; st_linear/kernels/cpu.py compiles this file.
//
// Queries are taken in strips, and a strip is held transposed: one vector holds one number of each of as many queries.
// So maxima and sums run over keys, never across a vector, and a strip's weights are never in memory beyond the cache.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

// Register tiles are arrays: the compiler keeps them in registers only if every loop over them is unrolled.
#define UNROLLED _Pragma("GCC unroll 16")

namespace {

using at::Tensor;
using at::vec::fmadd;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t kWidth = Vec::size();
constexpr int64_t kStrip = 64;  // queries
constexpr int64_t kTile = 128;  // keys whose weights are held at a time
constexpr float kNothing = -std::numeric_limits<float>::infinity();
constexpr float kMasked = -1e30f;  // st_linear.softmax.LOG_ZERO

// Register tiles, of rows by vectors. AVX2 has 16 registers, AVX-512 and NEON have 32.
constexpr bool kFewRegisters = kWidth == 8;
constexpr int kKeyRows = 4, kQueryVectors = kFewRegisters ? 2 : 4;
constexpr int kQueryRows = kFewRegisters ? 4 : 8, kValueVectors = 2;

// Rows of D numbers side by side, `stride` numbers apart.
struct Rows {
  const float* data;
  int64_t stride;

  const float* operator[](int64_t row) const {
    return data + row * stride;
  }
};

// Logits of keys by queries, and their maxima by query so far.
template <int keys, int vectors>
inline void logits_tile(Rows key, const float* query, int64_t head_dim, Vec scale, const float* bias, float* logits,
                        float* largest) {
  Vec sums[keys][vectors];
  UNROLLED for (int i = 0; i < keys; ++i) {
    UNROLLED for (int j = 0; j < vectors; ++j) sums[i][j] = Vec(0.f);
  }
  for (int64_t d = 0; d < head_dim; ++d) {
    Vec column[vectors];
    UNROLLED for (int j = 0; j < vectors; ++j) column[j] = Vec::loadu(query + d * kStrip + j * kWidth);
    UNROLLED for (int i = 0; i < keys; ++i) {
      const Vec number(key[i][d]);
      UNROLLED for (int j = 0; j < vectors; ++j) sums[i][j] = fmadd(number, column[j], sums[i][j]);
    }
  }
  UNROLLED for (int j = 0; j < vectors; ++j) {
    Vec most = Vec::loadu(largest + j * kWidth);
    UNROLLED for (int i = 0; i < keys; ++i) {
      const Vec logit = fmadd(sums[i][j], scale, Vec(bias[i]));
      logit.store(logits + i * kStrip + j * kWidth);
      most = at::vec::maximum(most, logit);
    }
    most.store(largest + j * kWidth);
  }
}

template <int vectors>
inline void logits_of(Rows key, int64_t keys, const float* query, int64_t head_dim, Vec scale, const float* bias,
                      float* logits, float* largest) {
  int64_t i = 0;
  for (; i + kKeyRows <= keys; i += kKeyRows) {
    logits_tile<kKeyRows, vectors>({key[i], key.stride}, query, head_dim, scale, bias + i, logits + i * kStrip, largest);
  }
  for (; i < keys; ++i) {
    logits_tile<1, vectors>({key[i], key.stride}, query, head_dim, scale, bias + i, logits + i * kStrip, largest);
  }
}

// output (queries, D) = carry * output + weights^T (queries, keys) @ value (keys, D), for some columns of value.
template <int vectors>
inline void add_values(const float* weights, Rows value, int64_t keys, const float* carry, Rows output, int64_t queries) {
  for (int64_t first = 0; first < queries; first += kQueryRows) {  // a strip has room for whole tiles
    Vec sums[kQueryRows][vectors];
    UNROLLED for (int i = 0; i < kQueryRows; ++i) {
      UNROLLED for (int j = 0; j < vectors; ++j) sums[i][j] = Vec(0.f);
    }
    for (int64_t k = 0; k < keys; ++k) {
      Vec row[vectors];
      UNROLLED for (int j = 0; j < vectors; ++j) row[j] = Vec::loadu(value[k] + j * kWidth);
      UNROLLED for (int i = 0; i < kQueryRows; ++i) {
        const Vec weight(weights[k * kStrip + first + i]);
        UNROLLED for (int j = 0; j < vectors; ++j) sums[i][j] = fmadd(weight, row[j], sums[i][j]);
      }
    }
    UNROLLED for (int i = 0; i < kQueryRows; ++i) {
      float* out = const_cast<float*>(output[first + i]);
      UNROLLED for (int j = 0; j < vectors; ++j) {
        fmadd(Vec::loadu(out + j * kWidth), Vec(carry[first + i]), sums[i][j]).store(out + j * kWidth);
      }
    }
  }
}

// A tile's rows side by side: rows of a text lie apart by all heads, and would evict each other from the cache.
inline Rows packed(Rows rows, int64_t count, int64_t head_dim, float* copy) {
  if (rows.stride == head_dim) return rows;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < head_dim; d += kWidth) Vec::loadu(rows[i] + d).store(copy + i * head_dim + d);
  }
  return {copy, head_dim};
}

// What a softmax over some keys leaves of a strip of queries, taken key tile by key tile.
class Strip {
 public:
  explicit Strip(int64_t head_dim)
      : head_dim_(head_dim),
        query_(head_dim * kStrip, 0.f),
        logits_(kTile * kStrip),
        key_(kTile * head_dim),
        value_(kTile * head_dim),
        output_(kStrip * head_dim),
        bias_(kTile) {}

  void start(Rows query, int64_t queries) {
    for (int64_t i = 0; i < queries; i += kWidth) {
      const int64_t some = std::min(kWidth, queries - i);
      at::vec::transpose_mxn<float>(query[i], query.stride, query_.data() + i, kStrip, some, head_dim_);
    }
    start(queries);
  }

  void start(int64_t queries) {
    queries_ = queries;
    std::fill_n(largest_, kStrip, kNothing);
    std::fill_n(sum_, kStrip, 0.f);
    std::fill_n(output_.begin(), kStrip * head_dim_, 0.f);
  }

  // Goes on from the mean and the logarithm of the sum that other keys have left.
  void go_on_from(Rows mean, const float* log_sum) {
    std::copy_n(log_sum, queries_, largest_);
    std::fill_n(sum_, queries_, 1.f);
    for (int64_t i = 0; i < queries_; ++i) std::copy_n(mean[i], head_dim_, output_.data() + i * head_dim_);
  }

  // Adds keys and values, of at most kTile tokens.
  void add(Rows key, Rows value, const float* bias, int64_t bias_stride, int64_t keys, float scale) {
    for (int64_t i = 0; i < keys; ++i) bias_[i] = bias ? bias[i * bias_stride] : 0.f;
    key = packed(key, keys, head_dim_, key_.data());
    std::copy_n(largest_, kStrip, before_);
    int64_t j = 0;
    for (; j + kQueryVectors * kWidth <= queries_; j += kQueryVectors * kWidth) {
      logits_of<kQueryVectors>(key, keys, query_.data() + j, head_dim_, Vec(scale), bias_.data(), logits_.data() + j,
                               largest_ + j);
    }
    for (; j < queries_; j += kWidth) {
      logits_of<1>(key, keys, query_.data() + j, head_dim_, Vec(scale), bias_.data(), logits_.data() + j, largest_ + j);
    }
    add_values_of(packed(value, keys, head_dim_, value_.data()), keys);
  }

  // Adds values whose logits are those of their rows, plus a bias by row and query.
  void add_rows(const std::vector<const float*>& rows, const float* logits, const float* bias, int64_t first, int64_t count) {
    std::copy_n(largest_, kStrip, before_);
    for (int64_t i = 0; i < count; ++i) {
      std::copy_n(rows[first + i], head_dim_, value_.data() + i * head_dim_);
      for (int64_t j = 0; j < queries_; j += kWidth) {
        const Vec sum = Vec(logits[first + i]) + Vec::loadu(bias + i * kStrip + j);
        sum.store(logits_.data() + i * kStrip + j);
        at::vec::maximum(Vec::loadu(largest_ + j), sum).store(largest_ + j);
      }
    }
    add_values_of({value_.data(), head_dim_}, count);
  }

  void finish(float* mean, int64_t stride, float* log_sum) {
    for (int64_t i = 0; i < queries_; i += kWidth) {
      (Vec::loadu(largest_ + i) + Vec::loadu(sum_ + i).log()).store(largest_ + i);
    }
    std::copy_n(largest_, queries_, log_sum);
    for (int64_t i = 0; i < queries_; ++i) {
      const Vec share(1.f / sum_[i]);
      for (int64_t d = 0; d < head_dim_; d += kWidth) {
        (Vec::loadu(output_.data() + i * head_dim_ + d) * share).store(mean + i * stride + d);
      }
    }
  }

 private:
  // Turns logits into weights, from their maxima so far, and adds what they weigh.
  void add_values_of(Rows value, int64_t keys) {
    float carry[kStrip];
    for (int64_t j = 0; j < queries_; j += kWidth) {
      const Vec most = Vec::loadu(largest_ + j), kept = (Vec::loadu(before_ + j) - most).exp_u20();
      kept.store(carry + j);
      Vec sum(0.f);
      for (int64_t i = 0; i < keys; ++i) {
        float* logits = logits_.data() + i * kStrip + j;
        const Vec weight = (Vec::loadu(logits) - most).exp_u20();
        weight.store(logits);
        sum = sum + weight;
      }
      fmadd(Vec::loadu(sum_ + j), kept, sum).store(sum_ + j);
    }
    int64_t d = 0;
    for (; d + kValueVectors * kWidth <= head_dim_; d += kValueVectors * kWidth) {
      add_values<kValueVectors>(logits_.data(), {value.data + d, value.stride}, keys, carry,
                                {output_.data() + d, head_dim_}, queries_);
    }
    for (; d < head_dim_; d += kWidth) {
      add_values<1>(logits_.data(), {value.data + d, value.stride}, keys, carry, {output_.data() + d, head_dim_},
                    queries_);
    }
  }

  int64_t head_dim_, queries_ = 0;
  std::vector<float> query_, logits_, key_, value_, output_, bias_;
  float largest_[kStrip], before_[kStrip], sum_[kStrip];
};

// Whether the kernel takes such rows: it reads whole vectors.
void check(const Tensor& rows, int64_t head_dim) {
  TORCH_CHECK(rows.scalar_type() == at::kFloat && rows.dim() == 5 && rows.stride(4) == 1, "5 dims of float32 rows");
  TORCH_CHECK(rows.size(4) == head_dim && head_dim % kWidth == 0, "D is the same in all, a multiple of ", kWidth);
}

// Numbers of block n of text b's head h, rows one `stride` apart; x is (B, H, n, rows, D).
Rows rows_of(const Tensor& x, int64_t b, int64_t h, int64_t n) {
  return {x.const_data_ptr<float>() + b * x.stride(0) + h * x.stride(1) + n * x.stride(2), x.stride(3)};
}

// See st_linear.softmax.fused_softmax_mean; (B, H, n, M, D) and (B, H, n, N, D), with a bias (B, H, n, 1, N), and
// another softmax's mean and logarithm, (B, H, n, M, D) and (B, H, n, M, 1).
std::tuple<Tensor, Tensor> softmax_mean(const Tensor& query, const Tensor& key, const Tensor& value,
                                        const std::optional<Tensor>& bias, double scale,
                                        const std::optional<Tensor>& other_mean,
                                        const std::optional<Tensor>& other_log_sum) {
  const int64_t texts = query.size(0), heads = query.size(1), blocks = query.size(2), queries = query.size(3),
                keys = key.size(3), head_dim = query.size(4);
  for (const Tensor& rows : {query, key, value}) check(rows, head_dim);
  // Tokens before heads in memory.
  const Tensor mean = at::empty({texts, blocks, queries, heads, head_dim}, query.options()).permute({0, 3, 1, 2, 4});
  const Tensor log_sum = at::empty({texts, heads, blocks, queries, 1}, query.options());
  const int64_t strips = (queries + kStrip - 1) / kStrip;
  at::parallel_for(0, texts * blocks * strips * heads, 1, [&](int64_t begin, int64_t end) {
    Strip strip(head_dim);
    for (int64_t task = begin; task < end; ++task) {
      // Heads change first: those of one token lie side by side.
      const int64_t h = task % heads, first = task / heads % strips * kStrip, n = task / heads / strips % blocks,
                    b = task / heads / strips / blocks, count = std::min(kStrip, queries - first);
      const Rows q = rows_of(query, b, h, n), k = rows_of(key, b, h, n), v = rows_of(value, b, h, n);
      strip.start({q[first], q.stride}, count);
      if (other_mean) {
        const Rows other = rows_of(*other_mean, b, h, n), logs = rows_of(*other_log_sum, b, h, n);
        strip.go_on_from({other[first], other.stride}, logs[first]);
      }
      for (int64_t start = 0; start < keys; start += kTile) {
        const float* biases = bias ? rows_of(*bias, b, h, n).data + start * bias->stride(4) : nullptr;
        strip.add({k[start], k.stride}, {v[start], v.stride}, biases, bias ? bias->stride(4) : 0,
                  std::min(kTile, keys - start), static_cast<float>(scale));
      }
      float* out = const_cast<float*>(rows_of(mean, b, h, n)[first]);
      strip.finish(out, mean.stride(3), const_cast<float*>(rows_of(log_sum, b, h, n)[first]));
    }
  });
  return {mean, log_sum};
}

// See st_linear.kernels.cpu.merge_states.
std::tuple<Tensor, Tensor> merge_states(at::TensorList values, at::TensorList log_weights, const Tensor& chosen) {
  const Tensor& like = values[0];
  const int64_t texts = like.size(0), heads = like.size(1), features = like.size(3), head_dim = like.size(4),
                merged = chosen.size(0), states = chosen.size(1);
  for (const Tensor& rows : values) check(rows, head_dim);
  const Tensor value = at::empty({texts, merged, features, heads, head_dim}, like.options()).permute({0, 3, 1, 2, 4});
  const Tensor log_weight = at::empty({texts, heads, merged, 1, features}, like.options());
  // The logarithm of `chosen`, as strips hold their logits: nothing to be added, or nothing left.
  const int64_t strips = (merged + kStrip - 1) / kStrip;
  const Tensor bias = at::full({strips, states, kStrip}, kMasked, like.options());
  for (int64_t m = 0; m < merged; ++m) {
    for (int64_t n = 0; n < states; ++n) {
      if (chosen.const_data_ptr<bool>()[m * chosen.stride(0) + n * chosen.stride(1)]) {
        bias.data_ptr<float>()[(m / kStrip * states + n) * kStrip + m % kStrip] = 0.f;
      }
    }
  }
  at::parallel_for(0, texts * heads * features, 1, [&](int64_t begin, int64_t end) {
    Strip strip(head_dim);
    std::vector<const float*> rows(states);
    std::vector<float> logs(states), results(kStrip);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t h = task % heads, r = task / heads % features, b = task / heads / features;
      int64_t state = 0;
      for (size_t part = 0; part < values.size(); ++part) {
        for (int64_t n = 0; n < values[part].size(2); ++n, ++state) {
          rows[state] = rows_of(values[part], b, h, n)[r];
          logs[state] = rows_of(log_weights[part], b, h, n).data[r * log_weights[part].stride(4)];
        }
      }
      for (int64_t first = 0; first < merged; first += kStrip) {
        const int64_t count = std::min(kStrip, merged - first);
        strip.start(count);
        for (int64_t n = 0; n < states; n += kTile) {
          const float* biases = bias.const_data_ptr<float>() + (first / kStrip * states + n) * kStrip;
          strip.add_rows(rows, logs.data(), biases, n, std::min(kTile, states - n));
        }
        strip.finish(const_cast<float*>(rows_of(value, b, h, first)[r]), value.stride(2), results.data());
        for (int64_t m = 0; m < count; ++m) {
          const_cast<float*>(rows_of(log_weight, b, h, first + m).data)[r] = results[m];
        }
      }
    }
  });
  return {value, log_weight};
}

}  // namespace

TORCH_LIBRARY(st_linear_cpu, library) {
  library.def(
      "softmax_mean(Tensor query, Tensor key, Tensor value, Tensor? bias, float scale, Tensor? other_mean, "
      "Tensor? other_log_sum) -> (Tensor, Tensor)",
      &softmax_mean);
  library.def("merge_states(Tensor[] values, Tensor[] log_weights, Tensor chosen) -> (Tensor, Tensor)", &merge_states);
}
