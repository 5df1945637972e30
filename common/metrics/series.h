// Families whose series come and go with a job or a worker. Internal to this room.
#pragma once

#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <map>
#include <mutex>
#include <string>

namespace ppft::metrics {

using Labels = std::map<std::string, std::string>;

// The series of one family, with removal by the value of one label.
template <typename Metric>
class SeriesSet {
 public:
  SeriesSet(prometheus::Family<Metric>& family, std::string key) : family_(family), key_(std::move(key)) {}

  template <typename... Args>
  Metric& At(const Labels& labels, const Args&... args) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto it = series_.find(labels);
    if (it == series_.end()) it = series_.emplace(labels, &family_.Add(labels, args...)).first;
    return *it->second;
  }

  void Drop(const std::string& value) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto it = series_.begin(); it != series_.end();) {
      const auto label = it->first.find(key_);
      if (label != it->first.end() && label->second == value) {
        family_.Remove(it->second);
        it = series_.erase(it);
      } else {
        ++it;
      }
    }
  }

 private:
  prometheus::Family<Metric>& family_;
  const std::string key_;
  std::mutex mutex_;
  std::map<Labels, Metric*> series_;
};

// A counter that follows a total kept elsewhere: growth is added; a total that went back adds nothing.
class FollowedTotals {
 public:
  double Growth(const Labels& labels, double total) {
    std::lock_guard<std::mutex> lock(mutex_);
    double& seen = seen_[labels];
    const double growth = total > seen ? total - seen : 0;
    seen = total;
    return growth;
  }
  void Forget(const std::string& key, const std::string& value) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto it = seen_.begin(); it != seen_.end();) {
      const auto label = it->first.find(key);
      it = label != it->first.end() && label->second == value ? seen_.erase(it) : std::next(it);
    }
  }
  void Reset(const Labels& subset) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [labels, seen] : seen_) {
      bool match = true;
      for (const auto& [key, value] : subset) {
        const auto label = labels.find(key);
        match = match && label != labels.end() && label->second == value;
      }
      if (match) seen = 0;
    }
  }

 private:
  std::mutex mutex_;
  std::map<Labels, double> seen_;
};

}  // namespace ppft::metrics
