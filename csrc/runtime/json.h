// JSON as a tree of values (RFC 8259), read from text that nobody vouches for.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace advkd {

struct Json {
  enum class Kind { null, boolean, integer, real, text, array, object };

  Kind kind = Kind::null;
  std::int64_t integer = 0;  // of a boolean, too: 0 or 1
  double real = 0.0;         // of an integer, too
  std::string text;
  std::vector<Json> items;
  std::vector<std::pair<std::string, Json>> members;

  // The member of that name; null where this is no object or has none.
  const Json* find(std::string_view name) const;
};

// Refuses text that is not one JSON value, nests deeper than 32 levels, repeats a name or has more
// than 4,096 members in an object. A number without fraction and exponent that fits is an integer; others are within an ulp.
Json parse_json(std::string_view text);

}  // namespace advkd
