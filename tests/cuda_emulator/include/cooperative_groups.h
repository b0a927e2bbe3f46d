// Thread-block clusters.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

class cluster_group {
 public:
  static void sync(emulator::Where where = emulator::Where::current()) {
    emulator::sync_cluster(where);
  }
  static unsigned block_rank() { return emulator::cluster_rank(); }
  static unsigned num_blocks() { return emulator::cluster_blocks(); }
  template <class T>
  static T* map_shared_rank(T* pointer, int rank) {
    return static_cast<T*>(emulator::map_shared(pointer, rank));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
