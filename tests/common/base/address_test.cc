#include "common/base/address.h"

#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"

namespace ppft {
namespace {

TEST(Address, NamesAndNumbersOfBothFamilies) {
  struct Case {
    const char* text;
    const char* host;
    int port;
  };
  for (const Case& c : {Case{"10.0.0.1:80", "10.0.0.1", 80}, {"gpu-1:7070", "gpu-1", 7070}, {"[::1]:80", "::1", 80}, {"[fe80::1]:65535", "fe80::1", 65535}}) {
    const absl::StatusOr<Address> address = ParseAddress(c.text, "--listen");
    ASSERT_TRUE(address.ok()) << address.status();
    EXPECT_EQ(address->host, c.host);
    EXPECT_EQ(address->port, c.port);
    EXPECT_EQ(FormatAddress(address->host, address->port), c.text);
  }
}

TEST(Address, OthersAreRefusedWithTheFlagsName) {
  for (const char* text :
       {"", "10.0.0.1", "host:", ":7070", "[]:7070", "::1:7070", "[::1]", "host:http", "host:-1", "host:+1", "host: 1", "host:65536", "host:0"}) {
    EXPECT_EQ(ParseAddress(text, "--listen").status(),
              absl::InvalidArgumentError(absl::StrCat("--listen \"", text, "\" is not HOST:PORT, such as 127.0.0.1:7070 or [::1]:7070")));
  }
  EXPECT_EQ(ParseAddress("host:0", "--listen", /*least_port=*/0)->port, 0);
}

TEST(Address, OnlyThisHostIsLoopback) {
  for (const char* host : {"localhost", "127.0.0.1", "127.3.2.1", "::1", "0:0:0:0:0:0:0:1"}) EXPECT_TRUE(IsLoopback(host)) << host;
  for (const char* host : {"", "0.0.0.0", "::", "10.0.0.1", "127.example.org", "localhost.example.org"}) EXPECT_FALSE(IsLoopback(host)) << host;
}

}  // namespace
}  // namespace ppft
