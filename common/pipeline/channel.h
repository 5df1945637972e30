// The ordered channels between pipeline ranks, and which transfer belongs to which compute action.
#pragma once

#include <optional>
#include <tuple>

#include "common/pipeline/action.h"

namespace ppft::pipeline {

// One direction and one kind of message between two ranks. What is sent first arrives first.
struct Channel {
  int from = 0;  // pipeline ranks
  int to = 0;
  bool gradients = false;  // else activations

  friend bool operator==(const Channel&, const Channel&) = default;
  friend bool operator<(const Channel& a, const Channel& b) { return std::tie(a.from, a.to, a.gradients) < std::tie(b.from, b.to, b.gradients); }
};

// The channel of a send or receive in a pipeline of `num_ranks`.
Channel ChannelOf(const Action& transfer, int num_ranks);

// The receive whose message `compute` (F or B) consumes: none for the first stage's forward and the last stage's backward. With one rank the message
// is handed over in place.
std::optional<Action> ReceiveBefore(const Action& compute, int num_stages);

// The send of what `compute` makes: none for the last stage's forward and the first stage's backward.
std::optional<Action> SendAfter(const Action& compute, int num_stages);

}  // namespace ppft::pipeline
