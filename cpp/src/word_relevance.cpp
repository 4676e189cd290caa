#include "lemo/word_relevance.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "lemo/blocks.h"
#include "lemo/check.h"
#include "parallel.h"

namespace lemo {
namespace {

constexpr int64_t kBefore = 16;                           // tokens in front of an answer
constexpr int64_t kPlace = 16;                            // tokens that hold most of an answer
constexpr int64_t kAroundBefore = 24, kAroundBehind = 8;  // tokens around its place
constexpr int64_t kNear = 16;  // tokens in which they have to stand together

/// Numbers ids in the order of their first appearance: a hash table with linear probing, which
/// takes a tenth of the time of std::unordered_map.
class Numbering {
public:
    /// For at most `most` different ids of at least 0.
    explicit Numbering(int64_t most) {
        size_t slots = 16;
        while (slots < 2 * static_cast<size_t>(most)) slots *= 2, --shift_;
        slots_.assign(slots, {-1, 0});
    }

    int32_t of(int64_t id) {
        // The high bits of a product with the golden ratio are spread well.
        size_t slot = static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u >> shift_;
        while (slots_[slot].id != id && slots_[slot].id >= 0) {
            slot = (slot + 1) & (slots_.size() - 1);
        }
        if (slots_[slot].id < 0) slots_[slot] = {id, next_++};
        return slots_[slot].number;
    }

private:
    struct Slot {
        int64_t id;
        int32_t number;
    };
    std::vector<Slot> slots_;
    int shift_ = 60;
    int32_t next_ = 0;
};

/// A sequence whose words are numbered from 0.
struct Text {
    std::vector<int32_t> words;         // [S]
    std::vector<float> rare_in_blocks;  // for each word log(blocks / blocks that have it)
    std::vector<float> rare_in_tokens;  // and log(tokens / tokens that are it)
    std::vector<char> free;             // for each block whether it has no labels
    int64_t block_size;

    int64_t num_tokens() const { return static_cast<int64_t>(words.size()); }
    int64_t num_blocks() const { return static_cast<int64_t>(free.size()); }
    int32_t word(int64_t token) const { return words[static_cast<size_t>(token)]; }
};

Text read_text(const WordRelevanceParams& params) {
    const int64_t tokens = params.ids.size(0);
    Text text;
    text.block_size = params.block_size;
    text.free.assign(static_cast<size_t>(num_blocks(tokens, params.block_size)), 1);
    const auto* firsts = params.firsts.as<const int64_t>();
    const auto* ends = params.ends.as<const int64_t>();
    for (int64_t a = 0; a < params.firsts.size(0); ++a) {
        for (int64_t block = firsts[a] / text.block_size; block <= (ends[a] - 1) / text.block_size;
             ++block) {
            text.free[static_cast<size_t>(block)] = 0;
        }
    }

    std::vector<int64_t> occurrences, blocks_with, last_block;
    const auto* ids = params.ids.as<const int64_t>();
    Numbering numbers(tokens);
    text.words.reserve(static_cast<size_t>(tokens));
    for (int64_t t = 0; t < tokens; ++t) {
        text.words.push_back(numbers.of(ids[t]));
        const auto word = static_cast<size_t>(text.words.back());
        if (word == occurrences.size()) {
            occurrences.push_back(0);
            blocks_with.push_back(0);
            last_block.push_back(-1);
        }
        ++occurrences[word];
        if (last_block[word] != t / text.block_size) ++blocks_with[word];
        last_block[word] = t / text.block_size;
    }
    const auto rare = [](int64_t all, int64_t some) {
        return std::log(static_cast<float>(all) / static_cast<float>(some));
    };
    for (size_t word = 0; word < occurrences.size(); ++word) {
        text.rare_in_blocks.push_back(rare(text.num_blocks(), blocks_with[word]));
        text.rare_in_tokens.push_back(rare(tokens, occurrences[word]));
    }
    return text;
}

/// Looks for the words of one answer after the other; what is needed for each word is kept.
class Search {
public:
    explicit Search(const Text& text)
        : text_(text), weight_(text.rare_in_tokens.size()), count_(weight_.size()),
          last_block_(weight_.size(), -1) {}

    /// [B], of an answer whose rows are [first, end).
    void relevance(int64_t first, int64_t end, float* out) {
        last_ = first;
        const int64_t tokens = text_.num_tokens(), blocks = text_.num_blocks();
        const int64_t behind = std::min(end + 1, tokens);
        std::vector<float> shared(static_cast<size_t>(blocks)), near(shared);

        look_for(std::max<int64_t>(first + 1 - kBefore, 0), behind, text_.rare_in_blocks);
        sum_shared(shared);
        look_for(first + 1, behind, text_.rare_in_tokens);
        int64_t place = -1;
        double most = 0;
        slide(kPlace, [&](int64_t token, double weight) {
            if (weight > most) place = token, most = weight;
        });
        if (place >= 0) {
            look_for(std::max<int64_t>(place + 1 - kAroundBefore, 0),
                     std::min(place + 1 + kAroundBehind, tokens), text_.rare_in_tokens);
            slide(kNear, [&](int64_t token, double weight) {
                const int64_t first_block =
                    std::max<int64_t>(token + 1 - kNear, 0) / text_.block_size;
                for (int64_t b = first_block; b <= token / text_.block_size; ++b) {
                    const auto block = static_cast<size_t>(b);
                    const auto square = static_cast<float>(weight * weight);
                    if (text_.free[block]) near[block] = std::max(near[block], square);
                }
            });
        }
        forget();
        divide_by_sum(shared);
        divide_by_sum(near);
        for (size_t b = 0; b < shared.size(); ++b) out[b] = std::max(shared[b], near[b]);
    }

private:
    /// From here on the words of the tokens [first, end) weigh what `rare` says, and no others.
    void look_for(int64_t first, int64_t end, const std::vector<float>& rare) {
        forget();
        for (int64_t token = first; token < end; ++token) {
            const auto word = static_cast<size_t>(text_.word(token));
            weight_[word] = rare[word];
            wanted_.push_back(word);
        }
    }

    void forget() {
        for (const size_t word : wanted_) weight_[word] = 0;
        wanted_.clear();
    }

    /// The weight of a token of the prompt; 0 where it does not count.
    float weight_at(int64_t token) const {
        const float weight = weight_[static_cast<size_t>(text_.word(token))];
        return weight > 0 && text_.free[static_cast<size_t>(token / text_.block_size)] ? weight : 0;
    }

    /// Adds to every block the weights of its different words.
    void sum_shared(std::vector<float>& sums) {
        for (int64_t token = 0; token <= last_; ++token) {
            const float weight = weight_at(token);
            const auto word = static_cast<size_t>(text_.word(token));
            const int64_t block = token / text_.block_size;
            if (weight > 0 && last_block_[word] != block) {
                sums[static_cast<size_t>(block)] += weight;
                last_block_[word] = block;
            }
        }
        for (const size_t word : wanted_) last_block_[word] = -1;
    }

    /// visit(token, weight of the different words that count among the `window` tokens that end
    /// there), for every token up to the answer where that is more than nothing.
    template <typename Visit>
    void slide(int64_t window, Visit&& visit) {
        double sum = 0;
        int64_t different = 0;
        for (int64_t token = 0; token <= last_; ++token) {
            if (token >= window) {
                const float weight = weight_at(token - window);
                const auto word = static_cast<size_t>(text_.word(token - window));
                if (weight > 0 && --count_[word] == 0) sum -= weight, --different;
            }
            const float weight = weight_at(token);
            const auto word = static_cast<size_t>(text_.word(token));
            if (weight > 0 && count_[word]++ == 0) sum += weight, ++different;
            if (different > 0) visit(token, sum);
        }
        for (const size_t word : wanted_) count_[word] = 0;
    }

    static void divide_by_sum(std::vector<float>& values) {
        double sum = 0;
        for (const float value : values) sum += value;
        if (sum == 0) return;
        for (float& value : values) value = static_cast<float>(value / sum);
    }

    const Text& text_;
    int64_t last_ = 0;                 // the last token that counts
    std::vector<float> weight_;        // of each word
    std::vector<size_t> wanted_;       // words that may weigh something
    std::vector<int32_t> count_;       // of each word in the window
    std::vector<int64_t> last_block_;  // the last block that each word was counted in
};

}  // namespace

void check(const WordRelevanceParams& params) {
    const Checker check("word_relevance");
    check.typed("ids", params.ids, DType::kInt64, 1);
    check.typed("firsts", params.firsts, DType::kInt64, 1);
    check.typed("ends", params.ends, DType::kInt64, 1);
    check.same_device({{"ids", &params.ids}, {"firsts", &params.firsts}, {"ends", &params.ends}});
    check.block_size(params.block_size);
    check.dim("ends", params.ends, 0, params.firsts.size(0), "the number of answers");
    if (params.ids.device != Device::kCpu) return;
    const int64_t tokens = params.ids.size(0);
    const auto* ids = params.ids.as<const int64_t>();
    const auto* negative = std::find_if(ids, ids + tokens, [](int64_t id) { return id < 0; });
    if (negative != ids + tokens) check.fail("ids", "at least 0", std::to_string(*negative));
    const auto* firsts = params.firsts.as<const int64_t>();
    const auto* ends = params.ends.as<const int64_t>();
    for (int64_t a = 0; a < params.firsts.size(0); ++a) {
        check.that(firsts[a] >= 0, "firsts", "rows of at least 0", firsts[a]);
        check.that(ends[a] > firsts[a] && ends[a] <= tokens, "ends",
                   "rows behind those of firsts, at most the number of tokens", ends[a]);
    }
}

void word_relevance_cpu(const WordRelevanceParams& params) {
    const int64_t answers = params.firsts.size(0);
    if (answers == 0) return;
    const Text text = read_text(params);
    const auto* firsts = params.firsts.as<const int64_t>();
    const auto* ends = params.ends.as<const int64_t>();
    auto* out = params.relevance.as<float>();
    // A thread is worth its while where it looks at some millions of tokens.
    const int64_t grain =
        std::max<int64_t>((int64_t{1} << 22) / std::max<int64_t>(text.num_tokens(), 1), 1);
    cpu::parallel_ranges(answers, grain, [&](int64_t first, int64_t end) {
        Search search(text);
        for (int64_t a = first; a < end; ++a) {
            search.relevance(firsts[a], ends[a], out + a * text.num_blocks());
        }
    });
}

}  // namespace lemo
