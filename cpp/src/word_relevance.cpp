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
    std::vector<int32_t> first_place;   // [words + 1]: where each word begins in `places`
    std::vector<int32_t> places;        // [S]: the tokens that are word 0, ascending, then word 1
    std::vector<float> rare_in_blocks;  // for each word log(blocks / blocks that have it)
    std::vector<float> rare_in_tokens;  // and log(tokens / tokens that are it)
    std::vector<char> free;             // for each block whether it has no labels
    int64_t block_size;

    int64_t num_tokens() const { return static_cast<int64_t>(words.size()); }
    int64_t num_blocks() const { return static_cast<int64_t>(free.size()); }
    size_t num_words() const { return rare_in_tokens.size(); }
    size_t word(int64_t token) const {
        return static_cast<size_t>(words[static_cast<size_t>(token)]);
    }

    /// visit(token, block) for the tokens up to `last` that are a word, ascending; those in blocks
    /// with labels are left out.
    template <typename Visit>
    void each_place(size_t word, int64_t last, Visit&& visit) const {
        int64_t block = -1, behind = 0;
        const auto end = places.begin() + first_place[word + 1];
        for (auto place = places.begin() + first_place[word]; place != end && *place <= last;
             ++place) {
            if (*place >= behind) block = *place / block_size, behind = (block + 1) * block_size;
            if (free[static_cast<size_t>(block)]) visit(int64_t{*place}, block);
        }
    }
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

    std::vector<int32_t> occurrences, blocks_with, last_block;
    const auto* ids = params.ids.as<const int64_t>();
    Numbering numbers(tokens);
    text.words.reserve(static_cast<size_t>(tokens));
    for (int32_t block = 0; block < text.num_blocks(); ++block) {
        const int64_t end = std::min((block + 1) * text.block_size, tokens);
        for (int64_t t = block * text.block_size; t < end; ++t) {
            text.words.push_back(numbers.of(ids[t]));
            const size_t word = text.word(t);
            if (word == occurrences.size()) {
                occurrences.push_back(0);
                blocks_with.push_back(0);
                last_block.push_back(-1);
            }
            ++occurrences[word];
            if (last_block[word] != block) ++blocks_with[word];
            last_block[word] = block;
        }
    }
    const auto rare = [](int64_t all, int64_t some) {
        return std::log(static_cast<float>(all) / static_cast<float>(some));
    };
    text.first_place.push_back(0);
    for (size_t word = 0; word < occurrences.size(); ++word) {
        text.rare_in_blocks.push_back(rare(text.num_blocks(), blocks_with[word]));
        text.rare_in_tokens.push_back(rare(tokens, occurrences[word]));
        text.first_place.push_back(text.first_place.back() + occurrences[word]);
    }
    text.places.resize(static_cast<size_t>(tokens));
    std::vector<int32_t> next(text.first_place);
    for (int64_t t = 0; t < tokens; ++t) {
        text.places[static_cast<size_t>(next[text.word(t)]++)] = static_cast<int32_t>(t);
    }
    return text;
}

/// Looks for the words of one answer after the other. Only tokens that are such a word are looked
/// at, by the places of each word, which are a small part of the text.
class Search {
public:
    explicit Search(const Text& text)
        : text_(text), weight_(text.num_words()), count_(text.num_words()),
          marks_(static_cast<size_t>(text.num_tokens() / 64 + 1)) {}

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
        slide(kPlace, [&](int64_t token, int64_t, double weight) {
            if (weight > most) place = token, most = weight;
        });
        if (place >= 0) {
            look_for(std::max<int64_t>(place + 1 - kAroundBefore, 0),
                     std::min(place + 1 + kAroundBehind, tokens), text_.rare_in_tokens);
            slide(kNear, [&](int64_t token, int64_t next, double weight) {
                const int64_t first_block =
                    std::max<int64_t>(token + 1 - kNear, 0) / text_.block_size;
                const auto square = static_cast<float>(weight * weight);
                for (int64_t b = first_block; b <= (next - 1) / text_.block_size; ++b) {
                    const auto block = static_cast<size_t>(b);
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
            const size_t word = text_.word(token);
            // A word that is everywhere weighs nothing.
            if (weight_[word] > 0 || rare[word] <= 0) continue;
            weight_[word] = rare[word];
            wanted_.push_back(word);
        }
    }

    void forget() {
        for (const size_t word : wanted_) weight_[word] = 0;
        wanted_.clear();
    }

    /// Adds to every block the weights of its different words.
    void sum_shared(std::vector<float>& sums) const {
        for (const size_t word : wanted_) {
            int64_t counted = -1;
            text_.each_place(word, last_, [&](int64_t, int64_t block) {
                if (block != counted) sums[static_cast<size_t>(block)] += weight_[word];
                counted = block;
            });
        }
    }

    /// Fills found_ with the tokens that count, ascending.
    void find() {
        found_.clear();
        for (const size_t word : wanted_) {
            text_.each_place(word, last_, [&](int64_t token, int64_t) {
                marks_[static_cast<size_t>(token / 64)] |= uint64_t{1} << token % 64;
            });
        }
        for (size_t i = 0; i < marks_.size(); ++i) {
            for (; marks_[i] != 0; marks_[i] &= marks_[i] - 1) {
                found_.push_back(static_cast<int64_t>(i) * 64 + __builtin_ctzll(marks_[i]));
            }
        }
    }

    /// visit(token, next, weight): of the different words that count among the `window` tokens that
    /// end at `token`, and at every token before `next`; where that is more than nothing.
    template <typename Visit>
    void slide(int64_t window, Visit&& visit) {
        find();
        double sum = 0;
        int64_t different = 0;
        size_t entered = 0, left = 0;
        // Of the next token at which a word enters or leaves the window.
        const auto change = [&] {
            const int64_t leaves = left < entered ? found_[left] + window : last_ + 1;
            const int64_t enters = entered < found_.size() ? found_[entered] : last_ + 1;
            return std::min({leaves, enters, last_ + 1});
        };
        for (int64_t token = change(), next = 0; token <= last_; token = next) {
            if (left < entered && found_[left] + window == token) {
                const size_t word = text_.word(found_[left++]);
                if (--count_[word] == 0) sum -= weight_[word], --different;
            }
            if (entered < found_.size() && found_[entered] == token) {
                const size_t word = text_.word(found_[entered++]);
                if (count_[word]++ == 0) sum += weight_[word], ++different;
            }
            next = change();
            if (different > 0) visit(token, next, sum);
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
    int64_t last_ = 0;             // the last token that counts
    std::vector<float> weight_;    // of each word; 0: it is not looked for
    std::vector<size_t> wanted_;   // words that weigh something
    std::vector<int32_t> count_;   // of each word in the window
    std::vector<uint64_t> marks_;  // a bit for each token; 0 between calls of `find`
    std::vector<int64_t> found_;   // see `find`
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
