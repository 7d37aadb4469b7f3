// Means under a softmax on the CPU, forward and backward, and the merging of states; st_linear/kernels/cpu.py compiles
// this file.
//
// Queries are taken in strips, and a strip is held transposed: one vector holds one number of each of as many queries.
// So maxima and sums run over keys, never across a vector, and a strip's weights never leave the cache.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
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
// Less than any logit, but finite: the difference of two is no NaN.
constexpr float kLowest = std::numeric_limits<float>::lowest();

// Register tiles, of rows by vectors. AVX2 has 16 registers, AVX-512 and NEON have 32.
constexpr bool kFewRegisters = kWidth == 8;
constexpr int kKeyRows = 4, kQueryVectors = kFewRegisters ? 2 : 4;
constexpr int kRows = kFewRegisters ? 4 : 8, kVectors = 2;

// Rows of numbers side by side, `stride` numbers apart.
struct Rows {
  float* data;
  int64_t stride;

  float* operator[](int64_t row) const {
    return data + row * stride;
  }
};

Rows from(Rows rows, int64_t first) {
  return {rows[first], rows.stride};
}

// Numbers anywhere: those of a row are `column_stride` apart.
struct Matrix {
  const float* data;
  int64_t row_stride, column_stride;
};

// a (rows, depth) @ b (depth, vectors); `use` is given the sums while they are in registers.
template <int rows, int vectors, typename Use>
C10_ALWAYS_INLINE void multiply(Matrix a, Rows b, int64_t depth, const Use& use) {
  Vec sums[rows][vectors];
  UNROLLED for (int i = 0; i < rows; ++i) {
    UNROLLED for (int j = 0; j < vectors; ++j) sums[i][j] = Vec(0.f);
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[vectors];
    UNROLLED for (int j = 0; j < vectors; ++j) row[j] = Vec::loadu(b[k] + j * kWidth);
    UNROLLED for (int i = 0; i < rows; ++i) {
      const Vec number(a.data[i * a.row_stride + k * a.column_stride]);
      UNROLLED for (int j = 0; j < vectors; ++j) sums[i][j] = fmadd(number, row[j], sums[i][j]);
    }
  }
  use(sums);
}

template <int number>
using Constant = std::integral_constant<int, number>;

// Cuts a matrix into register tiles: `take` is given rows and vectors of each, and where it begins. Columns beyond the
// last are taken too, up to a whole vector.
template <int rows, int vectors, typename Take>
C10_ALWAYS_INLINE void in_tiles(int64_t height, int64_t width, const Take& take) {
  const auto down = [&](auto wide, int64_t j) {
    int64_t i = 0;
    for (; i + rows <= height; i += rows) take(Constant<rows>(), wide, i, j);
    for (; i < height; ++i) take(Constant<1>(), wide, i, j);
  };
  int64_t j = 0;
  for (; j + vectors * kWidth <= width; j += vectors * kWidth) down(Constant<vectors>(), j);
  for (; j < width; j += kWidth) down(Constant<1>(), j);
}

// output (height, width) = carry * output + factor * a (height, depth) @ b (depth, width). No carry: 1 in every row.
C10_ALWAYS_INLINE void add_product(Matrix a, Rows b, int64_t height, int64_t depth, int64_t width, float factor,
                                   const float* carry, Rows output) {
  in_tiles<kRows, kVectors>(height, width, [&](auto rows, auto vectors, int64_t i, int64_t j) {
    const Matrix some{a.data + i * a.row_stride, a.row_stride, a.column_stride};
    multiply<rows.value, vectors.value>(some, {b.data + j, b.stride}, depth, [&](const auto& sums) {
      UNROLLED for (int m = 0; m < rows.value; ++m) {
        UNROLLED for (int n = 0; n < vectors.value; ++n) {
          float* out = output[i + m] + j + n * kWidth;
          const Vec before = carry ? Vec::loadu(out) * Vec(carry[i + m]) : Vec::loadu(out);
          fmadd(sums[m][n], Vec(factor), before).store(out);
        }
      }
    });
  });
}

// Logits (keys, strip) of keys (keys, D) by transposed queries (D, strip); `largest`, if any, follows their maxima.
C10_ALWAYS_INLINE void logits_of(Rows key, const float* query, int64_t keys, int64_t queries, int64_t head_dim,
                                 float scale, const float* bias, float* logits, float* largest) {
  in_tiles<kKeyRows, kQueryVectors>(keys, queries, [&](auto rows, auto vectors, int64_t i, int64_t j) {
    const Rows columns{const_cast<float*>(query) + j, kStrip};
    multiply<rows.value, vectors.value>({key[i], key.stride, 1}, columns, head_dim, [&](const auto& sums) {
      UNROLLED for (int n = 0; n < vectors.value; ++n) {
        Vec most = largest ? Vec::loadu(largest + j + n * kWidth) : Vec(0.f);
        UNROLLED for (int m = 0; m < rows.value; ++m) {
          const Vec logit = fmadd(sums[m][n], Vec(scale), Vec(bias[i + m]));
          logit.store(logits + (i + m) * kStrip + j + n * kWidth);
          most = at::vec::maximum(most, logit);
        }
        if (largest) most.store(largest + j + n * kWidth);
      }
    });
  });
}

// A tile's rows side by side: rows of a text lie apart by all heads, and would evict each other from the cache.
Rows packed(Rows rows, int64_t count, int64_t head_dim, float* copy) {
  if (rows.stride == head_dim) return rows;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < head_dim; d += kWidth) Vec::loadu(rows[i] + d).store(copy + i * head_dim + d);
  }
  return {copy, head_dim};
}

float total(Vec numbers) {
  return at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, numbers);
}

// Rows (count, D) as (D, strip).
void transpose(Rows rows, int64_t count, int64_t head_dim, float* strip) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const int some = static_cast<int>(std::min(kWidth, count - i));
    at::vec::transpose_mxn<float>(rows[i], rows.stride, strip + i, kStrip, some, static_cast<int>(head_dim));
  }
}

// Biases of some keys, which are nought where there are none.
void copy_bias(Rows bias, int64_t start, int64_t keys, float* copy) {
  for (int64_t i = 0; i < keys; ++i) copy[i] = bias.data ? *bias[start + i] : 0.f;
}

// What a softmax over some keys leaves of a strip of queries, taken key tile by key tile.
class Strip {
 public:
  explicit Strip(int64_t head_dim)
      : head_dim_(head_dim),
        query_(head_dim * kStrip),
        logits_(kTile * kStrip),
        key_(kTile * head_dim),
        value_(kTile * head_dim),
        output_(kStrip * head_dim),
        bias_(kTile) {}

  void start(int64_t queries) {
    queries_ = queries;
    std::fill_n(largest_, kStrip, kLowest);
    std::fill_n(sum_, kStrip, 0.f);
    std::fill_n(output_.begin(), kStrip * head_dim_, 0.f);
  }

  void start(Rows query, int64_t queries) {
    start(queries);
    transpose(query, queries, head_dim_, query_.data());
  }

  // Goes on from the mean and the logarithm of the sum that other keys have left.
  void go_on_from(Rows mean, Rows log_sum) {
    for (int64_t i = 0; i < queries_; ++i) {
      largest_[i] = *log_sum[i];
      sum_[i] = 1.f;
      std::copy_n(mean[i], head_dim_, output_.data() + i * head_dim_);
    }
  }

  void add(Rows key, Rows value, Rows bias, int64_t keys, float scale) {
    for (int64_t start = 0; start < keys; start += kTile) {
      const int64_t some = std::min(kTile, keys - start);
      copy_bias(bias, start, some, bias_.data());
      std::copy_n(largest_, kStrip, before_);
      logits_of(packed(from(key, start), some, head_dim_, key_.data()), query_.data(), some, queries_,
                head_dim_, scale, bias_.data(), logits_.data(), largest_);
      add_values(packed(from(value, start), some, head_dim_, value_.data()), some);
    }
  }

  // Adds values that lie anywhere. The logits of each are one for all queries, plus a bias (values, strip).
  void add(const std::vector<float*>& values, const std::vector<float>& logits, const float* bias) {
    const int64_t count = values.size();
    for (int64_t start = 0; start < count; start += kTile) {
      const int64_t some = std::min(kTile, count - start);
      std::copy_n(largest_, kStrip, before_);
      for (int64_t i = 0; i < some; ++i) {
        std::copy_n(values[start + i], head_dim_, value_.data() + i * head_dim_);
        for (int64_t j = 0; j < queries_; j += kWidth) {
          const Vec logit = Vec(logits[start + i]) + Vec::loadu(bias + (start + i) * kStrip + j);
          logit.store(logits_.data() + i * kStrip + j);
          at::vec::maximum(Vec::loadu(largest_ + j), logit).store(largest_ + j);
        }
      }
      add_values({value_.data(), head_dim_}, some);
    }
  }

  void finish(Rows mean, Rows log_sum) {
    for (int64_t i = 0; i < queries_; i += kWidth) {
      (Vec::loadu(largest_ + i) + Vec::loadu(sum_ + i).log()).store(largest_ + i);
    }
    for (int64_t i = 0; i < queries_; ++i) {
      *log_sum[i] = largest_[i];
      const Vec share(sum_[i] > 0.f ? 1.f / sum_[i] : 0.f);
      for (int64_t d = 0; d < head_dim_; d += kWidth) {
        (Vec::loadu(output_.data() + i * head_dim_ + d) * share).store(mean[i] + d);
      }
    }
  }

 private:
  // Turns logits into weights, as of the maxima so far, and adds what they weigh.
  void add_values(Rows value, int64_t keys) {
    float carry[kStrip] = {};
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
    add_product({logits_.data(), 1, kStrip}, value, queries_, keys, head_dim_, 1.f, carry,
                {output_.data(), head_dim_});
  }

  int64_t head_dim_, queries_ = 0;
  std::vector<float> query_, logits_, key_, value_, output_, bias_;
  float largest_[kStrip], before_[kStrip], sum_[kStrip];
};

// The gradients of a softmax over some keys by a strip of queries. With weights p, the gradient g of a mean and h of
// the logarithm of the sum, those of logits are p * (g.v - g.mean + h).
class GradientStrip {
 public:
  explicit GradientStrip(int64_t head_dim)
      : head_dim_(head_dim),
        query_(head_dim * kStrip),
        grad_mean_(head_dim * kStrip),
        query_rows_(kStrip * head_dim),
        grad_mean_rows_(kStrip * head_dim),
        grad_query_(kStrip * head_dim),
        weights_(kTile * kStrip),
        grad_logits_(kTile * kStrip),
        key_(kTile * head_dim),
        value_(kTile * head_dim),
        bias_(kTile),
        no_bias_(kTile, 0.f) {}

  void start(Rows query, Rows mean, Rows log_sum, Rows grad_mean, Rows grad_log_sum, Rows grad_query,
             int64_t queries) {
    queries_ = queries;
    grad_query_at_ = grad_query;
    transpose(query, queries, head_dim_, query_.data());
    transpose(grad_mean, queries, head_dim_, grad_mean_.data());
    query_at_ = packed(query, queries, head_dim_, query_rows_.data());
    grad_mean_at_ = packed(grad_mean, queries, head_dim_, grad_mean_rows_.data());
    std::fill_n(grad_query_.begin(), kStrip * head_dim_, 0.f);
    for (int64_t i = 0; i < queries; ++i) {
      Vec product(0.f);
      for (int64_t d = 0; d < head_dim_; d += kWidth) {
        product = fmadd(Vec::loadu(grad_mean[i] + d), Vec::loadu(mean[i] + d), product);
      }
      by_query_[i] = total(product) - *grad_log_sum[i];
      log_sum_[i] = *log_sum[i];
    }
  }

  // Adds to the gradients of keys, values and biases, but to those that are none.
  void add(Rows key, Rows value, Rows bias, int64_t keys, float scale, Rows grad_key, Rows grad_value,
           Rows grad_bias) {
    for (int64_t start = 0; start < keys; start += kTile) {
      const int64_t some = std::min(kTile, keys - start);
      const Rows k = packed(from(key, start), some, head_dim_, key_.data());
      const Rows v = packed(from(value, start), some, head_dim_, value_.data());
      copy_bias(bias, start, some, bias_.data());
      logits_of(k, query_.data(), some, queries_, head_dim_, scale, bias_.data(), weights_.data(), nullptr);
      logits_of(v, grad_mean_.data(), some, queries_, head_dim_, 1.f, no_bias_.data(), grad_logits_.data(), nullptr);
      for (int64_t i = 0; i < some; ++i) {
        Vec sum(0.f);
        for (int64_t j = 0; j < queries_; j += kWidth) {
          float *weights = weights_.data() + i * kStrip + j, *gradients = grad_logits_.data() + i * kStrip + j;
          const Vec weight = (Vec::loadu(weights) - Vec::loadu(log_sum_ + j)).exp_u20();
          weight.store(weights);
          const Vec gradient = weight * (Vec::loadu(gradients) - Vec::loadu(by_query_ + j));
          gradient.store(gradients);
          // Columns beyond the last query hold anything.
          if (grad_bias.data) sum = sum + Vec::set(Vec(0.f), gradient, std::min(kWidth, queries_ - j));
        }
        if (grad_bias.data) *grad_bias[start + i] += total(sum);
      }
      if (grad_value.data) {
        add_product({weights_.data(), kStrip, 1}, grad_mean_at_, some, queries_, head_dim_, 1.f, nullptr,
                    from(grad_value, start));
      }
      if (grad_key.data) {
        add_product({grad_logits_.data(), kStrip, 1}, query_at_, some, queries_, head_dim_, scale, nullptr,
                    from(grad_key, start));
      }
      if (grad_query_at_.data) {
        add_product({grad_logits_.data(), 1, kStrip}, k, queries_, some, head_dim_, scale, nullptr,
                    {grad_query_.data(), head_dim_});
      }
    }
  }

  void finish() {
    if (!grad_query_at_.data) return;
    for (int64_t i = 0; i < queries_; ++i) {
      std::copy_n(grad_query_.data() + i * head_dim_, head_dim_, grad_query_at_[i]);
    }
  }

 private:
  int64_t head_dim_, queries_ = 0;
  std::vector<float> query_, grad_mean_, query_rows_, grad_mean_rows_, grad_query_, weights_, grad_logits_, key_,
      value_, bias_, no_bias_;
  Rows query_at_{}, grad_mean_at_{}, grad_query_at_{};
  float by_query_[kStrip] = {}, log_sum_[kStrip] = {};
};

void check(const Tensor& x, at::IntArrayRef shape) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.device().is_cpu(), "float32 on the CPU wanted, got ", x.toString());
  TORCH_CHECK(x.sizes() == shape, "shape ", shape, " wanted, got ", x.sizes());
}

// Rows are read and written in whole vectors.
void check_rows(const Tensor& x, at::IntArrayRef shape) {
  check(x, shape);
  TORCH_CHECK(shape[4] % kWidth == 0, "D must be a multiple of ", kWidth, ", got ", shape[4]);
  TORCH_CHECK(x.stride(4) == 1, "numbers of a row must lie side by side, got strides ", x.strides());
}

// Rows of block n of text b's head h; x is (B, H, n, rows, D).
Rows rows_of(const Tensor& x, int64_t b, int64_t h, int64_t n) {
  return {static_cast<float*>(x.data_ptr()) + b * x.stride(0) + h * x.stride(1) + n * x.stride(2), x.stride(3)};
}

Rows rows_of(const std::optional<Tensor>& x, int64_t b, int64_t h, int64_t n) {
  return x ? rows_of(*x, b, h, n) : Rows{nullptr, 0};
}

// A number for each key, (B, H, n, 1, keys), if any.
Rows numbers_of(const std::optional<Tensor>& x, int64_t b, int64_t h, int64_t n) {
  return x ? Rows{rows_of(*x, b, h, n).data, x->stride(4)} : Rows{nullptr, 0};
}

int64_t strips_of(int64_t rows) {
  return (rows + kStrip - 1) / kStrip;
}

// See st_linear.softmax.fused_softmax_mean; (B, H, n, M, D) and (B, H, n, N, D), with a bias (B, H, n, 1, N), and
// another softmax's mean and logarithm, (B, H, n, M, D) and (B, H, n, M, 1). Writes the mean, returns the logarithm.
Tensor softmax_mean(const Tensor& mean, const Tensor& query, const Tensor& key, const Tensor& value,
                    const std::optional<Tensor>& bias, double scale, const std::optional<Tensor>& other_mean,
                    const std::optional<Tensor>& other_log_sum) {
  const int64_t texts = query.size(0), heads = query.size(1), blocks = query.size(2), queries = query.size(3),
                keys = key.size(3), head_dim = query.size(4), strips = strips_of(queries);
  for (const Tensor& rows : {mean, query}) check_rows(rows, {texts, heads, blocks, queries, head_dim});
  for (const Tensor& rows : {key, value}) check_rows(rows, {texts, heads, blocks, keys, head_dim});
  if (bias) check(*bias, {texts, heads, blocks, 1, keys});
  TORCH_CHECK(other_mean.has_value() == other_log_sum.has_value(), "a mean goes with the logarithm of its sum");
  if (other_mean) check_rows(*other_mean, query.sizes());
  if (other_log_sum) check(*other_log_sum, {texts, heads, blocks, queries, 1});
  const Tensor log_sum = at::empty({texts, heads, blocks, queries, 1}, query.options());
  at::parallel_for(0, texts * blocks * strips * heads, 1, [&](int64_t begin, int64_t end) {
    Strip strip(head_dim);
    for (int64_t task = begin; task < end; ++task) {
      // Heads change first: those of one token lie side by side.
      const int64_t h = task % heads, first = task / heads % strips * kStrip, n = task / heads / strips % blocks,
                    b = task / heads / strips / blocks;
      strip.start(from(rows_of(query, b, h, n), first), std::min(kStrip, queries - first));
      if (other_mean) {
        strip.go_on_from(from(rows_of(*other_mean, b, h, n), first), from(rows_of(*other_log_sum, b, h, n), first));
      }
      strip.add(rows_of(key, b, h, n), rows_of(value, b, h, n), numbers_of(bias, b, h, n), keys,
                static_cast<float>(scale));
      strip.finish(from(rows_of(mean, b, h, n), first), from(rows_of(log_sum, b, h, n), first));
    }
  });
  return log_sum;
}

// The gradients of softmax_mean, shapes as there, as far as they are wanted. That of queries is written; those of
// keys, values and biases, which may overlap from block to block, are added to what is there. So all blocks of a head
// are one thread's.
void add_softmax_gradients(const Tensor& grad_mean, const Tensor& grad_log_sum, const Tensor& query, const Tensor& key,
                           const Tensor& value, const std::optional<Tensor>& bias, double scale, const Tensor& mean,
                           const Tensor& log_sum, const std::optional<Tensor>& grad_query,
                           const std::optional<Tensor>& grad_key, const std::optional<Tensor>& grad_value,
                           const std::optional<Tensor>& grad_bias) {
  const int64_t texts = query.size(0), heads = query.size(1), blocks = query.size(2), queries = query.size(3),
                keys = key.size(3), head_dim = query.size(4);
  for (const auto& rows : {std::optional(query), std::optional(mean), std::optional(grad_mean), grad_query}) {
    if (rows) check_rows(*rows, {texts, heads, blocks, queries, head_dim});
  }
  for (const auto& rows : {std::optional(key), std::optional(value), grad_key, grad_value}) {
    if (rows) check_rows(*rows, {texts, heads, blocks, keys, head_dim});
  }
  for (const Tensor& x : {log_sum, grad_log_sum}) check(x, {texts, heads, blocks, queries, 1});
  if (bias) check(*bias, {texts, heads, blocks, 1, keys});
  if (grad_bias) check(*grad_bias, {texts, heads, blocks, 1, keys});
  at::parallel_for(0, texts * heads, 1, [&](int64_t begin, int64_t end) {
    GradientStrip strip(head_dim);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t h = task % heads, b = task / heads;
      for (int64_t n = 0; n < blocks; ++n) {
        for (int64_t first = 0; first < queries; first += kStrip) {
          strip.start(from(rows_of(query, b, h, n), first), from(rows_of(mean, b, h, n), first),
                      from(rows_of(log_sum, b, h, n), first), from(rows_of(grad_mean, b, h, n), first),
                      from(rows_of(grad_log_sum, b, h, n), first), from(rows_of(grad_query, b, h, n), first),
                      std::min(kStrip, queries - first));
          strip.add(rows_of(key, b, h, n), rows_of(value, b, h, n), numbers_of(bias, b, h, n), keys,
                    static_cast<float>(scale), rows_of(grad_key, b, h, n), rows_of(grad_value, b, h, n),
                    numbers_of(grad_bias, b, h, n));
          strip.finish();
        }
      }
    }
  });
}

// See st_linear.kernels.cpu.merge_states.
std::tuple<Tensor, Tensor> merge_states(at::TensorList values, at::TensorList log_weights, const Tensor& chosen) {
  TORCH_CHECK(!values.empty() && log_weights.size() == values.size(), "as many log weights as values, one at least");
  const Tensor& like = values[0];
  const int64_t texts = like.size(0), heads = like.size(1), features = like.size(3), head_dim = like.size(4),
                merged = chosen.size(0), states = chosen.size(1), strips = strips_of(merged);
  int64_t count = 0;
  for (size_t part = 0; part < values.size(); ++part) {
    const int64_t some = values[part].size(2);
    check_rows(values[part], {texts, heads, some, features, head_dim});
    check(log_weights[part], {texts, heads, some, 1, features});
    count += some;
  }
  TORCH_CHECK(count == states, count, " states, but `chosen` has ", states, " columns");
  // Features before heads in memory.
  const Tensor value = at::empty({texts, merged, features, heads, head_dim}, like.options()).permute({0, 3, 1, 2, 4});
  const Tensor log_weight = at::empty({texts, heads, merged, 1, features}, like.options());
  // The logarithm of `chosen`, a strip of merged states at a time.
  const Tensor bias = at::where(chosen, 0.f, -std::numeric_limits<float>::infinity()).to(at::kFloat);
  const Tensor biases = at::constant_pad_nd(bias, {0, 0, 0, strips * kStrip - merged})
                            .unflatten(0, {strips, kStrip})
                            .transpose(1, 2)
                            .contiguous();
  at::parallel_for(0, texts * features * heads, 1, [&](int64_t begin, int64_t end) {
    Strip strip(head_dim);
    std::vector<float*> rows(states);
    std::vector<float> logits(states);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t h = task % heads, r = task / heads % features, b = task / heads / features;
      int64_t state = 0;
      for (size_t part = 0; part < values.size(); ++part) {
        for (int64_t n = 0; n < values[part].size(2); ++n, ++state) {
          rows[state] = rows_of(values[part], b, h, n)[r];
          logits[state] = rows_of(log_weights[part], b, h, n).data[r * log_weights[part].stride(4)];
        }
      }
      for (int64_t first = 0; first < merged; first += kStrip) {
        strip.start(std::min(kStrip, merged - first));
        strip.add(rows, logits, biases.const_data_ptr<float>() + first * states);
        strip.finish({rows_of(value, b, h, first)[r], value.stride(2)},
                     {rows_of(log_weight, b, h, first).data + r, log_weight.stride(2)});
      }
    }
  });
  return {value, log_weight};
}

}  // namespace

TORCH_LIBRARY(st_linear_cpu, library) {
  library.def(
      "softmax_mean(Tensor(a!) mean, Tensor query, Tensor key, Tensor value, Tensor? bias, float scale, "
      "Tensor? other_mean, Tensor? other_log_sum) -> Tensor");
  library.def(
      "add_softmax_gradients(Tensor grad_mean, Tensor grad_log_sum, Tensor query, Tensor key, Tensor value, "
      "Tensor? bias, float scale, Tensor mean, Tensor log_sum, Tensor(a!)? grad_query, Tensor(b!)? grad_key, "
      "Tensor(c!)? grad_value, Tensor(d!)? grad_bias) -> ()");
  library.def("merge_states(Tensor[] values, Tensor[] log_weights, Tensor chosen) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(st_linear_cpu, CPU, library) {
  library.impl("softmax_mean", &softmax_mean);
  library.impl("add_softmax_gradients", &add_softmax_gradients);
  library.impl("merge_states", &merge_states);
}
