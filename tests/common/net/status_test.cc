#include "common/net/status.h"

#include <gmock/gmock.h>
#include <google/protobuf/unknown_field_set.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "common/net/channel.h"

namespace ppft::net {
namespace {

using ::testing::ElementsAre;
using ::testing::Pair;

// As any client reads a google.rpc.BadRequest: field 1 of it are its violations, whose fields 1 and 2 are texts.
std::vector<std::pair<std::string, std::string>> BadRequestOf(const absl::Status& status) {
  std::vector<std::pair<std::string, std::string>> violations;
  const auto payload = status.GetPayload("type.googleapis.com/google.rpc.BadRequest");
  google::protobuf::UnknownFieldSet request;
  if (!payload || !request.ParseFromString(std::string(*payload))) return violations;
  for (int i = 0; i < request.field_count(); ++i) {
    google::protobuf::UnknownFieldSet violation;
    EXPECT_EQ(request.field(i).number(), 1);
    EXPECT_TRUE(violation.ParseFromString(request.field(i).length_delimited()));
    violations.emplace_back(violation.field(0).length_delimited(), violation.field(1).length_delimited());
  }
  return violations;
}

TEST(Status, CodesMessagesAndDetailsTravel) {
  absl::Status status = absl::FailedPreconditionError("epoch 3 is not 4");
  SetErrorInfo(&status, {"STALE_EPOCH", {{"have", "3"}, {"need", "4"}}});
  SetFieldViolations(&status, {{"adapter.r", "0 is out of range"}, {"name", "is empty"}});
  status.SetPayload("private", absl::Cord("stays here"));
  const absl::Status back = StatusFromGrpc(ToGrpcStatus(status));
  EXPECT_EQ(back.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(back.message(), "epoch 3 is not 4");
  EXPECT_EQ(GetErrorInfo(back).reason, "STALE_EPOCH");
  EXPECT_EQ(GetErrorInfo(back).metadata.at("need"), "4");
  EXPECT_THAT(BadRequestOf(back), ElementsAre(Pair("adapter.r", "0 is out of range"), Pair("name", "is empty")));
  EXPECT_FALSE(back.GetPayload("private").has_value());
}

TEST(Status, OkAndPlainErrors) {
  EXPECT_TRUE(ToGrpcStatus(absl::OkStatus()).ok());
  EXPECT_TRUE(StatusFromGrpc(grpc::Status::OK).ok());
  const absl::Status plain = StatusFromGrpc(grpc::Status(grpc::StatusCode::NOT_FOUND, "no"));
  EXPECT_EQ(GetErrorInfo(plain).reason, "");
  EXPECT_TRUE(BadRequestOf(plain).empty());
  EXPECT_TRUE(ToGrpcStatus(absl::NotFoundError("x")).error_details().empty());
}

TEST(Status, DamagedDetailsAreIgnored) {
  for (const std::string& details : {std::string("\xff\xff\xff"), std::string("\x1a\xff"), std::string("\x1a\x02\x0a\x7f")}) {
    const absl::Status status = StatusFromGrpc(grpc::Status(grpc::StatusCode::ABORTED, "x", details));
    EXPECT_EQ(status.code(), absl::StatusCode::kAborted);
    EXPECT_EQ(GetErrorInfo(status).reason, "");
  }
}

// Trailers of more than 8 KiB would replace the error by RESOURCE_EXHAUSTED.
TEST(Status, LongTextsFitIntoTrailers) {
  absl::Status status = absl::InvalidArgumentError(std::string(5000, 'x') + std::string("é", 2) + std::string(5000, 'y'));
  std::vector<FieldViolation> many;
  for (int i = 0; i < 1000; ++i) many.push_back({"field" + std::to_string(i), "is wrong"});
  SetFieldViolations(&status, many);
  const grpc::Status wire = ToGrpcStatus(status);
  EXPECT_LT(wire.error_message().size() + wire.error_details().size(), 7500u);
  EXPECT_EQ(wire.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_FALSE(BadRequestOf(StatusFromGrpc(wire)).empty());
}

TEST(Status, OnlyPassingErrorsAreRetried) {
  EXPECT_TRUE(IsRetryable(absl::UnavailableError("")));
  EXPECT_TRUE(IsRetryable(absl::DeadlineExceededError("")));
  EXPECT_TRUE(IsRetryable(absl::AbortedError("")));
  EXPECT_FALSE(IsRetryable(absl::InvalidArgumentError("")));
  EXPECT_FALSE(IsRetryable(absl::DataLossError("")));
  EXPECT_FALSE(IsRetryable(absl::OkStatus()));
}

TEST(Backoff, GrowsToItsLimitAndStartsOver) {
  Backoff backoff(absl::Milliseconds(100), absl::Seconds(1));
  EXPECT_LE(backoff.Next(), absl::Milliseconds(121));
  for (int i = 0; i < 20; ++i) backoff.Next();
  const absl::Duration longest = backoff.Next();
  EXPECT_GE(longest, absl::Milliseconds(790));
  EXPECT_LE(longest, absl::Milliseconds(1210));
  backoff.Reset();
  EXPECT_LE(backoff.Next(), absl::Milliseconds(121));
}

}  // namespace
}  // namespace ppft::net
