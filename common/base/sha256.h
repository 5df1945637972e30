// SHA-256, incremental, by OpenSSL (it uses the CPU's SHA instructions).
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

struct evp_md_ctx_st;

namespace ppft {

class Sha256 {
 public:
  Sha256();
  void Update(absl::string_view bytes);
  // 64 lower-case hex digits. The object is spent afterwards.
  std::string HexDigest();

 private:
  struct Free {
    void operator()(evp_md_ctx_st* context) const;
  };
  std::unique_ptr<evp_md_ctx_st, Free> context_;
};

std::string Sha256Hex(absl::string_view bytes);
absl::StatusOr<std::string> Sha256File(const std::string& path);

// 64 digits of [0-9a-f].
bool IsSha256Hex(absl::string_view text);

}  // namespace ppft
