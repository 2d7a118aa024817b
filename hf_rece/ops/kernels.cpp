// The streaming kernel and the hash of RECE for float32 rows of a CPU: see stream_native.py.
//
// A task is a block of one group's tokens and classes. Its logits are kept transposed, (classes,
// tokens), so that everything that belongs to a token is a vector lane. Results are added in the
// order of the tasks, each thread to the tokens and classes that it owns: no two write one place,
// and sums do not depend on the number of threads. Gradients, which take room, are added whenever
// each thread has done one task.

#include <omp.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <optional>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 12;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 6;
#else
constexpr int kLanes = 4, kRows = 6;
#endif
constexpr int kWide = 2;                   // vectors a row of the register tile
constexpr int kTokens = 256, kClasses = 128;  // a block of logits: it stays in the cache
constexpr int kTaskClasses = 1024;            // a backward task's, block by block
constexpr int kAhead = 16;                    // rows asked for before they are needed
constexpr int kTasks = 64;                     // at least, however few tokens there are
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef float LooseVec __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t LooseInts __attribute__((vector_size(4 * kLanes), aligned(4)));

inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
inline Ints load(const int32_t* p) { return *reinterpret_cast<const LooseInts*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
inline Vec all(float x) { return Vec{} + x; }
inline Ints all(int32_t x) { return Ints{} + x; }
inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
inline int64_t pieces(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// exp(x) within 2 units in the last place for x <= 88; 0 below -87; NaN stays NaN.
inline Vec exponential(Vec x) {
  const Vec round = all(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer below
  Vec shifted = x * 1.44269504088896341f + round;
  Vec n = shifted - round;
  Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Vec y = (Vec)((Ints)p + (((Ints)shifted - (Ints)round) << 23));
  y = x < -87.0f ? Vec{} : y;
  return x != x ? x : y;
}

// ------------------------------------------------------------------------------------- products

// C (R, V vectors) = or += A (R, k) B (k, V vectors), where A[r, i] lies at a[r * row + i * step].
template <int R, int V>
void register_tile(int64_t k, const float* a, int64_t row, int64_t step, const float* b, int64_t ldb,
                   float* c, int64_t ldc, bool add) {
  Vec sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = add ? load(c + r * ldc + v * kLanes) : Vec{};
  for (int64_t i = 0; i < k; ++i) {
    Vec right[V];
    for (int v = 0; v < V; ++v) right[v] = load(b + i * ldb + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const float left = a[r * row + i * step];
      for (int v = 0; v < V; ++v) sum[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(c + r * ldc + v * kLanes, sum[r][v]);
}

template <int R, int V, typename... Rest>
void last_rows(int64_t n, Rest... rest) {
  if (n == R) return register_tile<R, V>(rest...);
  if constexpr (R > 1) last_rows<R - 1, V>(n, rest...);
}

template <int V>
void columns(int64_t n, int64_t k, const float* a, int64_t row, int64_t step, const float* b,
             int64_t ldb, float* c, int64_t ldc, bool add) {
  int64_t r = 0;
  for (; r + kRows <= n; r += kRows)
    register_tile<kRows, V>(k, a + r * row, row, step, b, ldb, c + r * ldc, ldc, add);
  if (r < n) last_rows<kRows - 1, V>(n - r, k, a + r * row, row, step, b, ldb, c + r * ldc, ldc, add);
}

// C (n, m) = or += A (n, k) B (k, m); m is a multiple of the lanes.
void product(int64_t n, int64_t m, int64_t k, const float* a, int64_t row, int64_t step,
             const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  int64_t j = 0;
  for (; j + kWide * kLanes <= m; j += kWide * kLanes)
    columns<kWide>(n, k, a, row, step, b + j, ldb, c + j, ldc, add);
  for (; j < m; j += kLanes) columns<1>(n, k, a, row, step, b + j, ldb, c + j, ldc, add);
}

// (width, lanes) from vectors (n, width), which repeat in the lanes beyond them.
std::vector<float> turn(const float* vectors, int64_t n, int64_t width, int64_t lanes) {
  std::vector<float> turned(width * lanes);
  for (int64_t i = 0; i < lanes; ++i)
    for (int64_t d = 0; d < width; ++d) turned[d * lanes + i] = vectors[(i % n) * width + d];
  return turned;
}

// The lanes in which x is above y, as bits.
inline uint32_t above(Vec x, Vec y) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)y, _CMP_GT_OQ));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= (uint32_t)(x[lane] > y[lane]) << lane;
  return bits;
#endif
}

}  // namespace

// --------------------------------------------------------------------------------------- a grid

extern "C" {

struct Earlier {
  const void *token_chunks, *class_chunks;  // of int16, or int32
  int32_t reach, is_short;

  int32_t at(const void* table, int64_t id) const {
    return is_short ? static_cast<const int16_t*>(table)[id] : static_cast<const int32_t*>(table)[id];
  }
};

// One grid of a plan, see plan.py; null where there is none. Field for field _Problem in
// stream_native.py.
struct Problem {
  const float *hidden, *rows, *bias;
  const int32_t *tokens, *classes;
  const int64_t *skip_start;                  // (G + 1,): a group's part of the two lists
  const int32_t *skip_token, *skip_class;     // places in the group
  const int32_t* own_labels;
  const Earlier* earlier;
  const uint8_t* blocked;                     // (C,)
  const float *token_log_weight, *class_log_weight;
  int64_t n_tokens, n_classes, width, n_groups, n, m, n_earlier, first_group, n_threads;
  float scale, softcap;                       // softcap 0: none
};

}  // extern "C"

namespace {

struct Task {
  int64_t group, token_start, token_stop, class_start, class_stop;
};

struct Block {
  const Problem& p;
  int64_t ld;                          // width, in whole lanes
  std::vector<float> hidden, turned;   // (tokens, ld) and (width, kTokens)
  std::vector<float> rows, logits, slope, log_weight, shift;
  std::vector<float> scaled, factor;   // of a backward task: hidden times factor
  std::vector<float> grad_hidden, grad_rows, grad_bias;
  std::vector<float> top, total;       // of each token of a forward task
  std::vector<int64_t> token_ids, place;
  std::vector<int64_t> class_ids, task_class_ids;  // -1: a class that is not scored
  std::vector<int32_t> place_in_block, labels, chunks;
  int64_t n = 0, lanes = 0, m = 0, group = 0;

  explicit Block(const Problem& problem)
      : p(problem), ld(round_up(problem.width, kLanes)), hidden(kTokens * ld),
        turned(p.width * kTokens), rows(kClasses * ld), logits(kClasses * kTokens),
        slope(p.softcap > 0 ? kClasses * kTokens : 0), log_weight(kTokens), shift(kTokens),
        top(kTokens), total(kTokens), labels(kTokens), chunks(p.n_earlier * kTokens) {}

  // Take the task's tokens, without padding and those that the group has not won.
  void take_tokens(const Task& t, const int32_t* winner) {
    group = t.group;
    token_ids.clear(), place.clear();
    const int64_t span = t.token_stop - t.token_start;
    place_in_block.assign(span, -1);
    for (int64_t i = t.token_start; i < t.token_stop; ++i) {
      const int64_t id = p.tokens[group * p.n + i];
      if (id >= p.n_tokens || (winner && winner[id] != p.first_group + group)) continue;
      place_in_block[i - t.token_start] = token_ids.size();
      token_ids.push_back(id), place.push_back(i);
    }
    n = token_ids.size(), lanes = round_up(n, kLanes);
    for (int64_t i = 0; i < lanes; ++i) {
      float* to = &hidden[i * ld];
      if (i < n) std::memcpy(to, p.hidden + token_ids[i] * p.width, 4 * p.width);
      else std::memset(to, 0, 4 * ld);
      for (int64_t d = 0; d < p.width; ++d) turned[d * kTokens + i] = to[d];
      const int64_t id = i < n ? token_ids[i] : p.n_tokens;
      labels[i] = p.own_labels && i < n ? p.own_labels[id] : -1;
      for (int64_t e = 0; e < p.n_earlier; ++e)
        chunks[e * kTokens + i] = i < n ? p.earlier[e].at(p.earlier[e].token_chunks, id) : 0;
      log_weight[i] = i < n && p.token_log_weight ? p.token_log_weight[group * p.n + place[i]] : 0;
    }
  }

  int64_t class_at(int64_t place) const {
    return p.classes ? p.classes[group * p.m + place] : place;
  }

  void take_classes(int64_t start, int64_t stop) {
    m = stop - start;
    class_ids.resize(m);
    for (int64_t j = 0; j < m; ++j) {
      if (start + j + kAhead < stop) prefetch(p.rows, class_at(start + j + kAhead));
      const int64_t id = class_at(start + j);
      const bool scored = id < p.n_classes && !(p.blocked && p.blocked[id]);
      class_ids[j] = scored ? id : -1;
      if (scored) std::memcpy(&rows[j * ld], p.rows + id * p.width, 4 * p.width);
      else std::memset(&rows[j * ld], 0, 4 * p.width);
    }
  }

  // Ask for a row before it is needed: rows lie scattered, and memory answers late.
  void prefetch(const float* table, int64_t id) const {
    if (id >= p.n_classes) return;
    for (int64_t d = 0; d < p.width; d += 16) __builtin_prefetch(table + id * p.width + d);
  }

  // Make the logits (m, lanes) of the tokens and classes taken, -inf where they are dropped.
  void score(const Task& t, int64_t start) {
    product(m, lanes, p.width, rows.data(), ld, 1, turned.data(), kTokens, logits.data(), kTokens,
            false);
    const bool shaped = p.bias || p.scale != 1 || p.softcap > 0 || p.class_log_weight;
    for (int64_t j = 0; j < m; ++j) {
      float* line = &logits[j * kTokens];
      const int64_t id = class_ids[j];
      if (id < 0) {
        std::fill(line, line + lanes, -kInfinity);
        continue;
      }
      if (shaped) shape(j, start, line);
      if (p.own_labels)
        for (int64_t i = 0; i < lanes; i += kLanes)
          store(line + i, load(&labels[i]) == all((int32_t)id) ? all(-kInfinity) : load(line + i));
      for (int64_t e = 0; e < p.n_earlier; ++e) {
        const Earlier& round = p.earlier[e];
        const Ints own = all(round.at(round.class_chunks, id)), reach = all(round.reach);
        for (int64_t i = 0; i < lanes; i += kLanes) {
          const Ints gap = load(&chunks[e * kTokens + i]) - own;
          store(line + i, (gap <= reach) & (gap >= -reach) ? all(-kInfinity) : load(line + i));
        }
      }
    }
    if (!p.skip_start) return;
    for (int64_t s = p.skip_start[group]; s < p.skip_start[group + 1]; ++s) {
      const int64_t i = p.skip_token[s] - t.token_start, j = p.skip_class[s] - start;
      if (i < 0 || i >= t.token_stop - t.token_start || j < 0 || j >= m) continue;
      if (place_in_block[i] >= 0) logits[j * kTokens + place_in_block[i]] = -kInfinity;
    }
  }

  void shape(int64_t j, int64_t start, float* line) {
    const float bias = p.bias ? p.bias[class_ids[j]] : 0;
    const float weight = p.class_log_weight ? p.class_log_weight[group * p.m + start + j] : 0;
    for (int64_t i = 0; i < lanes; i += kLanes) {
      Vec z = (load(line + i) + bias) * p.scale;
      if (p.softcap > 0) {
        // tanh(x) = 1 - 2 / (exp(2x) + 1), which cancels near zero; beyond 20 it is 1.
        Vec x = z / p.softcap;
        x = x > 20.0f ? all(20.0f) : x;
        const Vec far = 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
        const Vec s = x * x;
        const Vec series = -17.0f / 315 + s * (62.0f / 2835);
        const Vec near = x * (1.0f + s * (-1.0f / 3 + s * (2.0f / 15 + s * series)));
        const Vec tanh = s < 0.04f ? near : far;
        store(&slope[j * kTokens + i], 1.0f - tanh * tanh);
        z = tanh * p.softcap;
      }
      store(line + i, z + weight);
    }
  }

  // Fold the logits into top and total: total * exp(top) is the sum of exponentials.
  void fold() {
    for (int64_t i = 0; i < lanes; i += kLanes) {
      const Vec old = load(&top[i]);
      Vec best = old;
      for (int64_t j = 0; j < m; ++j) {
        const Vec z = load(&logits[j * kTokens + i]);
        best = z > best ? z : best;
      }
      Vec sum = load(&total[i]) * exponential(old - best);
      for (int64_t j = 0; j < m; ++j) sum += exponential(load(&logits[j * kTokens + i]) - best);
      store(&top[i], best), store(&total[i], sum);
    }
  }

  // Take what the merge made of the tokens: to subtract from their logits, and their gradients.
  void take_merged(const float* shifts, const float* factors) {
    scaled.resize(kTokens * ld), factor.resize(kTokens);
    for (int64_t i = 0; i < lanes; ++i) {
      // exp(logit - inf) = 0: the share of a lane that is no token.
      shift[i] = i < n ? shifts[token_ids[i]] - log_weight[i] : kInfinity;
      factor[i] = i < n ? factors[token_ids[i]] : 0;
      for (int64_t d = 0; d < ld; ++d) scaled[i * ld + d] = factor[i] * hidden[i * ld + d];
    }
  }

  // Add the gradients of the classes taken, the task's from `first` on; those of the tokens lack
  // their factor.
  void add_grads(int64_t first, bool for_hidden, bool for_rows, bool for_bias) {
    task_class_ids.insert(task_class_ids.end(), class_ids.begin(), class_ids.end());
    if (for_hidden)
      product(n, ld, m, logits.data(), 1, kTokens, rows.data(), ld, grad_hidden.data(), ld, true);
    if (for_rows) {
      grad_rows.resize(kTaskClasses * ld);
      product(m, ld, n, logits.data(), kTokens, 1, scaled.data(), ld, &grad_rows[first * ld], ld,
              false);
    }
    if (!for_bias) return;
    grad_bias.resize(kTaskClasses);
    for (int64_t j = 0; j < m; ++j) {
      Vec sum{};
      for (int64_t i = 0; i < lanes; i += kLanes)
        sum += load(&logits[j * kTokens + i]) * load(&factor[i]);
      grad_bias[first + j] = 0;
      for (int lane = 0; lane < kLanes; ++lane) grad_bias[first + j] += sum[lane];
    }
  }

  // Overwrite the logits by their shares of the merge.
  void to_shares() {
    for (int64_t j = 0; j < m; ++j)
      for (int64_t i = 0; i < lanes; i += kLanes) {
        float* at = &logits[j * kTokens + i];
        Vec share = exponential(load(at) - load(&shift[i]));
        if (p.softcap > 0 && class_ids[j] >= 0) share *= load(&slope[j * kTokens + i]);
        store(at, share);
      }
  }
};

inline void add_row(float* to, const float* from, float factor, int64_t width) {
  for (int64_t d = 0; d < width; ++d) to[d] += factor * from[d];
}

// Which tokens and classes a thread may write.
struct Owner {
  uint64_t me = omp_get_thread_num(), team = omp_get_num_threads();

  bool owns(int64_t id) const {
    // Neighbours go to different owners; a division would take longer than the addition.
    return ((uint64_t)((uint32_t)id * 2654435769u) * team) >> 32 == me;
  }
};

// Fold a group's sum * exp(best) into a token's total * exp(top).
inline void add_exponentials(float best, float sum, float& top, float& total) {
  if (best > top) {
    total = total * std::exp(top - best) + sum;
    top = best;
  } else {
    total += sum * std::exp(best - top);
  }
}

// Fold a group's log(sum) + best into a token's largest.
inline void keep_largest(float best, float sum, int64_t group, float& top, int32_t& winner) {
  const float value = std::log(sum) + best;
  // Of groups with equal values the last wins: one group alone, as published.
  if (value >= top && value > -kInfinity) {
    top = value;
    winner = group;
  } else if (value != value) {
    top = value;
  }
}

// No exception may leave a parallel region, or C: it would end the process. The first one, which can
// only be about memory, lets the others do no more work, and is told to Python as a status.
struct Attempt {
  std::atomic<bool> failed{false};

  template <typename Work>
  void operator()(Work work) {
    if (failed) return;
    try {
      work();
    } catch (const std::exception&) {
      failed = true;
    }
  }
};

// Runs work(block, task) for all tasks, and after each turn merge(block, owner).
template <typename Work, typename Merge>
void in_turns(const Problem& p, const std::vector<Task>& tasks, Attempt& attempt, Work work,
              Merge merge) {
  const int64_t n_threads = std::min<int64_t>(p.n_threads, std::max<size_t>(tasks.size(), 1));
  std::vector<Block*> blocks(n_threads);
#pragma omp parallel num_threads(n_threads)
  {
    const Owner mine;
    std::optional<Block> own;
    attempt([&] { blocks[mine.me] = &own.emplace(p); });
#pragma omp barrier
    for (size_t turn = 0; turn < tasks.size(); turn += mine.team) {
      attempt([&] {
        if (turn + mine.me < tasks.size()) work(*own, tasks[turn + mine.me]);
      });
#pragma omp barrier
      attempt([&] {
        for (size_t t = 0; t < mine.team && turn + t < tasks.size(); ++t) merge(*blocks[t], mine);
      });
#pragma omp barrier
    }
  }
}

std::vector<Task> cut(const Problem& p, int64_t classes_a_task) {
  std::vector<Task> tasks;
  for (int64_t g = 0; g < p.n_groups; ++g)
    for (int64_t c = 0; c < p.m; c += classes_a_task)
      for (int64_t t = 0; t < p.n; t += kTokens)
        tasks.push_back({g, t, std::min(t + kTokens, p.n), c, std::min(c + classes_a_task, p.m)});
  return tasks;
}

void forward(const Problem& p, Attempt& attempt, float* top, float* total, int32_t* winner) {
  const int64_t blocks = p.n_groups * pieces(p.n, kTokens);
  // Groups are compared by their whole log-sum-exp; sums may be split to keep all threads busy.
  const int64_t splits = winner ? 1 : std::max<int64_t>(1, kTasks / std::max<int64_t>(blocks, 1));
  const auto tasks = cut(p, round_up(std::max<int64_t>(pieces(p.m, splits), 1), kClasses));
  std::vector<int64_t> first(tasks.size() + 1, 0);  // where a task's tokens are in the two below
  for (size_t t = 0; t < tasks.size(); ++t)
    first[t + 1] = first[t] + tasks[t].token_stop - tasks[t].token_start;
  std::vector<float> best(first.back()), sums(first.back());
#pragma omp parallel num_threads(p.n_threads)
  {
    std::optional<Block> own;
    attempt([&] { own.emplace(p); });
#pragma omp for schedule(dynamic)
    for (size_t task = 0; task < tasks.size(); ++task)
      attempt([&] {
        Block& b = *own;
        const Task& t = tasks[task];
        b.take_tokens(t, nullptr);
        std::fill(b.top.begin(), b.top.end(), kLowest);
        std::fill(b.total.begin(), b.total.end(), 0.0f);
        for (int64_t c = t.class_start; b.n && c < t.class_stop; c += kClasses) {
          b.take_classes(c, std::min(c + kClasses, t.class_stop));
          b.score(t, c);
          b.fold();
        }
        for (int64_t i = 0; i < b.n; ++i) {
          const int64_t at = first[task] + b.place[i] - t.token_start;
          best[at] = b.top[i] + b.log_weight[i], sums[at] = b.total[i];
        }
      });
    const Owner mine;
    for (size_t task = 0; task < tasks.size() && !attempt.failed; ++task)
      for (int64_t at = first[task]; at < first[task + 1]; ++at) {
        const Task& t = tasks[task];
        const int64_t id = p.tokens[t.group * p.n + t.token_start + at - first[task]];
        if (id >= p.n_tokens || !mine.owns(id)) continue;
        if (winner) keep_largest(best[at], sums[at], p.first_group + t.group, top[id], winner[id]);
        else add_exponentials(best[at], sums[at], top[id], total[id]);
      }
  }
}

void backward(const Problem& p, Attempt& attempt, const float* shift, const float* factor,
              const int32_t* winner, float* grad_hidden, float* grad_rows, float* grad_bias) {
  in_turns(
      p, cut(p, kTaskClasses), attempt,
      [&](Block& b, const Task& t) {
        b.take_tokens(t, winner);
        if (!b.n) return;
        b.take_merged(shift, factor);
        b.grad_hidden.assign(b.lanes * b.ld, 0.0f);
        b.task_class_ids.clear();
        for (int64_t c = t.class_start; c < t.class_stop; c += kClasses) {
          b.take_classes(c, std::min(c + kClasses, t.class_stop));
          b.score(t, c);
          b.to_shares();
          b.add_grads(c - t.class_start, grad_hidden, grad_rows, grad_bias);
        }
      },
      [&](Block& b, const Owner& mine) {
        if (!b.n) return;
        for (int64_t i = 0; grad_hidden && i < b.n; ++i)
          if (mine.owns(b.token_ids[i]))
            add_row(grad_hidden + b.token_ids[i] * p.width, &b.grad_hidden[i * b.ld], b.factor[i],
                    p.width);
        const int64_t m = b.task_class_ids.size();
        for (int64_t j = 0; j < m; ++j) {
          const int64_t id = b.task_class_ids[j];
          if (grad_rows && j + kAhead < m && b.task_class_ids[j + kAhead] >= 0)
            b.prefetch(grad_rows, b.task_class_ids[j + kAhead]);
          if (id < 0 || !mine.owns(id)) continue;
          if (grad_bias) grad_bias[id] += b.grad_bias[j];
          if (grad_rows) add_row(grad_rows + id * p.width, &b.grad_rows[j * b.ld], 1.0f, p.width);
        }
      });
}

}  // namespace

extern "C" {

// All functions return 0, or 1 where there was not enough memory: what they wrote is of no use then.

// Fold a grid into each token's (top, total), for sums of exponentials (winner null); else into
// top, the largest log-sum-exp of a group, and winner, the number of that group.
int32_t stream_forward(const Problem* problem, float* top, float* total, int32_t* winner) {
  Attempt attempt;
  attempt([&] { forward(*problem, attempt, top, total, winner); });
  return attempt.failed;
}

// Add the gradients of a grid. shift (N,) is the merged value; factor (N,) its gradient times the
// scale; gradients (N, D), (C, D), (C,) or null.
int32_t stream_backward(const Problem* problem, const float* shift, const float* factor,
                        const int32_t* winner, float* grad_hidden, float* grad_rows,
                        float* grad_bias) {
  Attempt attempt;
  attempt([&] {
    backward(*problem, attempt, shift, factor, winner, grad_hidden, grad_rows, grad_bias);
  });
  return attempt.failed;
}

// found (K,): the first of the directions (B, D) with the largest inner product with each row (K, D).
int32_t nearest(const float* rows, int64_t n_rows, int64_t width, const float* directions,
                int64_t n_directions, int32_t* found, int64_t n_threads) {
  Attempt attempt;
  attempt([&] {
    const int64_t lanes = round_up(n_directions, kLanes);
    const std::vector<float> turned = turn(directions, n_directions, width, lanes);
    const int64_t step = 8 * kRows;
#pragma omp parallel num_threads(n_threads)
    {
      std::vector<float> scores;
      attempt([&] { scores.resize(step * lanes); });
#pragma omp for schedule(static)
      for (int64_t start = 0; start < n_rows; start += step) {
        if (attempt.failed) continue;
        const int64_t n = std::min(step, n_rows - start);
        product(n, lanes, width, rows + start * width, width, 1, turned.data(), lanes,
                scores.data(), lanes, false);
        for (int64_t i = 0; i < n; ++i) {
          const float* line = &scores[i * lanes];
          Vec best = load(line);
          Ints at{};
          for (int64_t b = kLanes; b < lanes; b += kLanes) {
            const Vec z = load(line + b);
            at = z > best ? all((int32_t)b) : at;
            best = z > best ? z : best;
          }
          int32_t first = at[0];
          float largest = best[0];
          for (int lane = 1; lane < kLanes; ++lane)
            if (best[lane] > largest || (best[lane] == largest && at[lane] + lane < first)) {
              largest = best[lane];
              first = at[lane] + lane;
            }
          found[start + i] = first % n_directions;
        }
      }
    }
  });
  return attempt.failed;
}

// Collect the scores <query, row> + bias above each query's threshold, rows in order: n_hits (Q,),
// and scores and ids (Q, capacity). A query with more hits than fit has the first of them.
int32_t search(const float* queries, int64_t n_queries, int64_t width, const float* rows,
               int64_t n_rows, const float* bias, const float* threshold, int64_t capacity,
               int64_t* n_hits, float* scores, int64_t* ids, int64_t n_threads) {
  Attempt attempt;
  attempt([&] {
    struct Hit {
      int64_t row;
      int32_t query;
      float score;
    };
    const int64_t lanes = round_up(n_queries, kLanes), step = 8 * kRows;
    std::vector<float> turned = turn(queries, n_queries, width, lanes);
    std::vector<float> limits(lanes, kInfinity);
    std::copy(threshold, threshold + n_queries, limits.begin());
    std::vector<std::vector<Hit>> found(n_threads);
#pragma omp parallel num_threads(n_threads)
    {
      std::vector<float> block;
      attempt([&] { block.resize(step * lanes); });
      std::vector<Hit>& own = found[omp_get_thread_num()];
#pragma omp for schedule(static)
      for (int64_t start = 0; start < n_rows; start += step)
        attempt([&] {
          const int64_t n = std::min(step, n_rows - start);
          product(n, lanes, width, rows + start * width, width, 1, turned.data(), lanes,
                  block.data(), lanes, false);
          for (int64_t i = 0; i < n; ++i) {
            const Vec shift = all(bias ? bias[start + i] : 0.0f);
            for (int64_t q = 0; q < lanes; q += kLanes) {
              const Vec z = load(&block[i * lanes + q]) + shift;
              for (uint32_t hit = above(z, load(&limits[q])); hit; hit &= hit - 1) {
                const int lane = __builtin_ctz(hit);
                own.push_back({start + i, (int32_t)(q + lane), z[lane]});
              }
            }
          }
        });
    }
    std::fill(n_hits, n_hits + n_queries, 0);
    for (const auto& hits : found)
      for (const Hit& hit : hits) {
        const int64_t place = n_hits[hit.query]++;
        if (place >= capacity) continue;
        scores[hit.query * capacity + place] = hit.score;
        ids[hit.query * capacity + place] = hit.row;
      }
  });
  return attempt.failed;
}

}  // extern "C"
