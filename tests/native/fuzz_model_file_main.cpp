// Feeds the fuzzer's function with mutated model files: fuzz_model_file_main FILES OUT SEED_FILE...
//
// Mutations know the layout (docs/file-format.md): most change numbers or names of the header and
// keep its length right, so that they come past the first checks. The same FILES give the same
// inputs everywhere. The input that a sanitizer or the clock stops at is written to OUT.
#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <sanitizer/common_interface_defs.h>
#include <unistd.h>

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size);

namespace {

constexpr std::size_t kLengthBytes = 8;
constexpr unsigned kPatience = 30;  // seconds for one input, on a loaded machine

std::string current;
std::string current_path;

void write_current() {
  std::ofstream(current_path, std::ios::binary) << current;
  std::fprintf(stderr, "the input is %s\n", current_path.c_str());
}

void out_of_time(int) {
  write_current();
  _exit(1);
}

// SplitMix64 (Steele, Lea and Flood 2014).
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::size_t below(std::size_t bound) {
    state_ += 0x9E3779B97F4A7C15u;
    std::uint64_t z = state_;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return static_cast<std::size_t>((z ^ z >> 31) % bound);
  }

  bool one_in(std::size_t n) { return below(n) == 0; }

 private:
  std::uint64_t state_;
};

// A file in its parts.
struct File {
  std::string header, data;

  static File of(const std::string& bytes) {
    std::uint64_t length = 0;
    for (std::size_t i = kLengthBytes; i-- > 0;) {
      length = length << 8 | static_cast<unsigned char>(bytes.at(i));
    }
    const std::size_t size = static_cast<std::size_t>(length);
    return {bytes.substr(kLengthBytes, size), bytes.substr(kLengthBytes + size)};
  }

  std::string bytes(std::uint64_t length) const {
    std::string all;
    for (std::size_t i = 0; i < kLengthBytes; ++i) all += static_cast<char>(length >> 8 * i);
    return all + header + data;
  }
};

// A piece of the header's text.
struct Token {
  std::size_t at, size;
};

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }

// Numbers, or else names and words.
std::vector<Token> tokens_of(const std::string& text, bool numbers) {
  std::vector<Token> found;
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t first = i;
    const auto belongs = [&](char c) {
      return numbers ? is_digit(c) : is_letter(c) || (i > first && (is_digit(c) || c == '.'));
    };
    while (i < text.size() && belongs(text[i])) ++i;
    if (i == first) {
      ++i;
    } else {
      found.push_back({first, i - first});
    }
  }
  return found;
}

std::string other_number(const std::string& number, Random& random) {
  static const char* const kOdd[] = {
      "0", "1", "2", "3", "4", "7", "8", "15", "16", "17", "64", "1024", "4096", "16384", "65536",
      "1048576", "268435456", "2147483647", "2147483648", "4294967295", "4294967296",
      "1099511627776", "1099511627777", "9223372036854775807", "9223372036854775808",
      "18446744073709551615", "99999999999999999999999999", "-1", "-0", "1.5", "1e3", "1e308",
      "1e-320", "1e999", "1e99999999999", "00", "0x10", "null", "true", "[]", "{}", "\\\"1\\\"", ""};
  constexpr std::size_t kCount = sizeof kOdd / sizeof *kOdd;
  const std::size_t choice = random.below(4);
  if (choice < 2 || number.size() > 15) return kOdd[random.below(kCount)];
  const long long value = std::stoll(number);
  if (choice == 2) return std::to_string(value + (random.one_in(2) ? 1 : -1));
  static const long long kFactors[] = {2, 3, 4, 16, 256};
  const long long factor = kFactors[random.below(5)];
  return std::to_string(random.one_in(2) ? value * factor : value / factor);
}

void change_number(std::string& text, Random& random) {
  const std::vector<Token> numbers = tokens_of(text, true);
  if (numbers.empty()) return;
  const Token token = numbers[random.below(numbers.size())];
  text.replace(token.at, token.size, other_number(text.substr(token.at, token.size), random));
}

// A name or a number becomes another one of the file.
void copy_token(std::string& text, Random& random) {
  const std::vector<Token> tokens = tokens_of(text, random.one_in(2));
  if (tokens.empty()) return;
  const Token from = tokens[random.below(tokens.size())], to = tokens[random.below(tokens.size())];
  text.replace(to.at, to.size, text.substr(from.at, from.size));
}

// A stretch between two commas is removed, doubled or moved.
void move_part(std::string& text, Random& random) {
  std::vector<std::size_t> commas;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == ',') commas.push_back(i);
  }
  if (commas.size() < 4) return;
  const std::size_t first = random.below(commas.size() - 3);
  const std::size_t last = first + 1 + random.below(std::min<std::size_t>(40, commas.size() - first - 1));
  const std::string part = text.substr(commas[first], commas[last] - commas[first]);
  const std::size_t kind = random.below(3);
  const std::size_t to = commas[random.below(commas.size())];
  if (kind > 0) text.insert(kind == 1 ? commas[first] : to, part);
  if (kind == 0) text.erase(commas[first], part.size());
}

void change_byte(std::string& text, Random& random) {
  if (text.empty()) return;
  static constexpr char kSigns[] = "{}[]\",:\\0-+.eE \n\0\xff";
  char& byte = text[random.below(text.size())];
  byte = random.one_in(2) ? static_cast<char>(byte ^ 1 << random.below(8))
                          : kSigns[random.below(sizeof kSigns - 1)];
}

void nest(std::string& text, Random& random) {
  const std::size_t depth = 1 + random.below(40), at = random.below(text.size() + 1);
  text.insert(at, std::string(depth, random.one_in(2) ? '[' : '{'));
}

std::string mutated(const std::vector<std::string>& seeds, Random& random) {
  File file = File::of(seeds[random.below(seeds.size())]);
  std::uint64_t length_error = 0;
  for (std::size_t change = 0; change == 0 || !random.one_in(2); ++change) {
    switch (random.below(16)) {
      case 0:
        change_byte(file.header, random);
        break;
      case 1:
        change_byte(file.data, random);
        break;
      case 2:
        file.data.resize(random.below(file.data.size() + 64));
        break;
      case 3:
        length_error = std::uint64_t{1} << random.below(64);
        break;
      case 4:
        nest(file.header, random);
        break;
      case 5:
      case 6:
        move_part(file.header, random);
        break;
      case 7:
      case 8:
      case 9:
        copy_token(file.header, random);
        break;
      default:
        change_number(file.header, random);
    }
  }
  std::string bytes = file.bytes(file.header.size() + length_error);
  if (random.one_in(32)) bytes.resize(random.below(bytes.size() + 1));
  return bytes;
}

std::string read_file(const char* path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

int run_one(const std::string& bytes) {
  current = bytes;
  alarm(kPatience);
  // A copy of exactly that size, so that the sanitizer sees what lies beyond.
  const std::vector<unsigned char> exact(bytes.begin(), bytes.end());
  return LLVMFuzzerTestOneInput(exact.data(), exact.size());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return std::fprintf(stderr, "usage: %s FILES OUT SEED_FILE...\n", argv[0]), 2;
  const long files = std::atol(argv[1]);
  current_path = argv[2];
  __sanitizer_set_death_callback(write_current);
  std::signal(SIGALRM, out_of_time);
  std::signal(SIGABRT, out_of_time);
  std::vector<std::string> seeds;
  for (int i = 3; i < argc; ++i) {
    seeds.push_back(read_file(argv[i]));
    if (run_one(seeds.back()) != 1) return std::fprintf(stderr, "%s does not open\n", argv[i]), 1;
  }
  Random random(20240531);
  long opened = 0;
  for (long i = 0; i < files; ++i) opened += run_one(mutated(seeds, random));
  std::printf("%ld mutated files: %ld open and generate, %ld are refused\n", files, opened,
              files - opened);
  return 0;
}
