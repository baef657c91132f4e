#include "runtime/json.h"

#include "runtime/error.h"

namespace advkd {
namespace {

constexpr int kDeepest = 32;
constexpr std::size_t kMostMembers = 4096;  // names are compared with all before them

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json whole() {
    Json value = this->value(0);
    skip_space();
    if (at_ != text_.size()) fail("text after its end");
    return value;
  }

 private:
  [[noreturn]] void fail(const char* what) const {
    refuse("not JSON: " + std::string(what) + " at byte " + std::to_string(at_));
  }

  char next() {
    if (at_ == text_.size()) fail("it ends too early");
    return text_[at_++];
  }

  bool take(char expected) {
    if (at_ == text_.size() || text_[at_] != expected) return false;
    ++at_;
    return true;
  }

  void expect(std::string_view word) {
    for (const char c : word) {
      if (next() != c) fail("an unknown word");
    }
  }

  void skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' ||
                                  text_[at_] == '\r')) {
      ++at_;
    }
  }

  Json value(int depth) {
    if (depth > kDeepest) fail("values nested too deep");
    skip_space();
    if (at_ == text_.size()) fail("it ends too early");
    switch (text_[at_]) {
      case '{':
        return object(depth);
      case '[':
        return array(depth);
      case '"':
        return string();
      case 't':
        return word("true", Json::Kind::boolean, 1);
      case 'f':
        return word("false", Json::Kind::boolean, 0);
      case 'n':
        return word("null", Json::Kind::null, 0);
      default:
        return number();
    }
  }

  Json word(std::string_view text, Json::Kind kind, std::int64_t integer) {
    expect(text);
    Json value;
    value.kind = kind;
    value.integer = integer;
    return value;
  }

  Json object(int depth) {
    Json value;
    value.kind = Json::Kind::object;
    ++at_;
    skip_space();
    if (take('}')) return value;
    do {
      skip_space();
      if (at_ == text_.size() || text_[at_] != '"') fail("a member without a name");
      std::string name = string().text;
      if (value.find(name) != nullptr) fail("a repeated name");
      skip_space();
      if (!take(':')) fail("a name without a value");
      if (value.members.size() == kMostMembers) fail("too many members");
      Json member = this->value(depth + 1);
      value.members.emplace_back(std::move(name), std::move(member));
      skip_space();
    } while (take(','));
    if (!take('}')) fail("an object without an end");
    return value;
  }

  Json array(int depth) {
    Json value;
    value.kind = Json::Kind::array;
    ++at_;
    skip_space();
    if (take(']')) return value;
    do {
      value.items.push_back(this->value(depth + 1));
      skip_space();
    } while (take(','));
    if (!take(']')) fail("an array without an end");
    return value;
  }

  Json string() {
    Json value;
    value.kind = Json::Kind::text;
    ++at_;
    for (;;) {
      const char c = next();
      if (c == '"') return value;
      if (static_cast<unsigned char>(c) < 0x20) fail("a control character");
      if (c == '\\') {
        escaped(value.text);
      } else {
        value.text.push_back(c);
      }
    }
  }

  void escaped(std::string& to) {
    static constexpr char kFrom[] = "\"\\/bfnrt", kTo[] = "\"\\/\b\f\n\r\t";
    const char c = next();
    if (c == 'u') return unicode(to);
    for (int i = 0; kFrom[i] != '\0'; ++i) {
      if (c == kFrom[i]) return to.push_back(kTo[i]);
    }
    fail("an unknown escape");
  }

  std::uint32_t four_digits() {
    std::uint32_t code = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = next();
      const std::uint32_t digit = c >= '0' && c <= '9'   ? static_cast<std::uint32_t>(c - '0')
                                  : c >= 'a' && c <= 'f' ? static_cast<std::uint32_t>(c - 'a' + 10)
                                  : c >= 'A' && c <= 'F' ? static_cast<std::uint32_t>(c - 'A' + 10)
                                                         : 16;
      if (digit == 16) fail("an escape that is not hexadecimal");
      code = code * 16 + digit;
    }
    return code;
  }

  // A code point as UTF-8; two surrogates are one.
  void unicode(std::string& to) {
    std::uint32_t code = four_digits();
    if (code >= 0xD800 && code < 0xDC00) {
      if (next() != '\\' || next() != 'u') fail("half a surrogate pair");
      const std::uint32_t low = four_digits();
      if (low < 0xDC00 || low > 0xDFFF) fail("half a surrogate pair");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    } else if (code >= 0xDC00 && code < 0xE000) {
      fail("half a surrogate pair");
    }
    const auto byte = [&to](std::uint32_t bits) { to.push_back(static_cast<char>(bits)); };
    if (code < 0x80) return byte(code);
    if (code < 0x800) {
      byte(0xC0 | code >> 6);
    } else {
      if (code < 0x10000) {
        byte(0xE0 | code >> 12);
      } else {
        byte(0xF0 | code >> 18);
        byte(0x80 | (code >> 12 & 0x3F));
      }
      byte(0x80 | (code >> 6 & 0x3F));
    }
    byte(0x80 | (code & 0x3F));
  }

  bool digit() const { return at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; }

  // Adds digits to a mantissa of up to 18, and returns how many more there were.
  int digits(std::uint64_t& mantissa, int& count) {
    if (!digit()) fail("a number without digits");
    int left_out = 0;
    for (; digit(); ++at_) {
      if (mantissa < 100000000000000000u) {
        mantissa = mantissa * 10 + static_cast<std::uint64_t>(text_[at_] - '0');
        ++count;
      } else if (++left_out > 400) {
        fail("a number of too many digits");
      }
    }
    return left_out;
  }

  // Not by strtod, which reads as the program's locale says.
  Json number() {
    Json value;
    const bool negative = take('-');
    std::uint64_t mantissa = 0;
    int count = 0;
    const std::size_t first = at_;
    int exponent = digits(mantissa, count);
    if (text_[first] == '0' && at_ - first > 1) fail("a number that begins with 0");
    const bool whole = exponent == 0 && (at_ == text_.size() || (text_[at_] != '.' &&
                                         text_[at_] != 'e' && text_[at_] != 'E'));
    if (take('.')) {
      int decimals = 0;
      digits(mantissa, decimals);
      exponent -= decimals;
    }
    if (take('e') || take('E')) exponent += written_exponent();
    value.kind = whole ? Json::Kind::integer : Json::Kind::real;
    value.integer = negative ? -static_cast<std::int64_t>(mantissa)
                             : static_cast<std::int64_t>(mantissa);
    value.real = scaled(static_cast<double>(mantissa), exponent);
    if (negative) value.real = -value.real;
    return value;
  }

  int written_exponent() {
    const bool negative = take('-');
    if (!negative) take('+');
    std::uint64_t exponent = 0;
    int count = 0;
    if (digits(exponent, count) != 0 || exponent > 1000) fail("an exponent out of range");
    return negative ? -static_cast<int>(exponent) : static_cast<int>(exponent);
  }

  // value * 10^exponent. Powers up to 10^22 are exact, so for the usual number this rounds once.
  static double scaled(double value, int exponent) {
    for (; exponent >= 22; exponent -= 22) value *= 1e22;
    for (; exponent <= -22; exponent += 22) value /= 1e22;
    double power = 1.0;
    for (int i = 0; i < (exponent < 0 ? -exponent : exponent); ++i) power *= 10.0;
    return exponent < 0 ? value / power : value * power;
  }

  const std::string_view text_;
  std::size_t at_ = 0;
};

}  // namespace

const Json* Json::find(std::string_view name) const {
  for (const auto& [key, value] : members) {
    if (key == name) return &value;
  }
  return nullptr;
}

Json parse_json(std::string_view text) { return Parser(text).whole(); }

}  // namespace advkd
