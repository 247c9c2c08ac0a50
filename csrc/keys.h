// Sorts rows by their keys, and finds the columns that match each row.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/gram.h"

namespace tclr {

struct Keys {  // of one group
  const int64_t* data;
  int64_t stride;
  int64_t operator[](int64_t i) const { return data[i * stride]; }
};

// The indices of the rows, sorted by key; rows of equal keys stay in their order.
inline void sort_by_key(Keys keys, int64_t n, int64_t* order) {
  for (int64_t i = 0; i < n; ++i) order[i] = i;
  std::stable_sort(order, order + n, [&](int64_t i, int64_t j) { return keys[i] < keys[j]; });
}

// Finds the columns with each sorted row's key, in one pass over both sides.
inline void match_keys(Keys rows, const int64_t* row_order, int64_t n, Keys columns, const int64_t* column_order,
                       int64_t K, Match* match) {
  int64_t begin = 0, end = 0;
  for (int64_t i = 0; i < n; ++i) {
    int64_t key = rows[row_order[i]];
    while (begin < K && columns[column_order[begin]] < key) ++begin;
    end = std::max(begin, end);
    while (end < K && columns[column_order[end]] == key) ++end;
    match[i] = key < 0 ? Match{0, 0, -1} : Match{begin, end, -1};
  }
}

// For each row, finds the column with the same index: before sorting, row i has the index of column i + `first`. An
// order is null if that side is not sorted. place: memory for K elements.
inline void match_index(int64_t first, const int64_t* row_order, int64_t n, const int64_t* column_order, int64_t K,
                        int64_t* place, Match* match) {
  for (int64_t j = 0; j < K; ++j) place[column_order ? column_order[j] : j] = j;
  for (int64_t i = 0; i < n; ++i) match[i].own = place[first + (row_order ? row_order[i] : i)];
}

}  // namespace tclr
