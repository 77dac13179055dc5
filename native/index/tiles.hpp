// Tiles: four blocks' keys and slots. A node is a list of tiles, so that splitting and trimming move no blocks, and
// memory never fragments: all tiles are of one size.
//
// Within a chunk of tiles the keys lie together, and so do the low and the high parts of each column's slots: tiles with
// consecutive numbers are read as one array.
#pragma once
#include <cstdlib>
#include <new>

#include "types.hpp"

namespace flexkv::index {

class Tiles {
 public:
  static constexpr uint32_t kBlocks = 4;         // a tile
  static constexpr uint32_t kChunkTiles = 4096;  // a chunk

  explicit Tiles(uint32_t columns) : columns_(columns) {}
  ~Tiles() { release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  // A tile whose slots are all empty.
  TileId take() {
    TileId tile;
    if (free_ != kNone) {
      tile = free_;
      std::memcpy(&free_, key(tile, 0), sizeof free_);
    } else {
      if (next_ == chunks_.size() * kChunkTiles) add_chunk();
      tile = next_++;
    }
    for (uint32_t column = 0; column < columns_; ++column) {
      std::memset(low(tile, column), 0xff, kBlocks * sizeof(uint32_t));
      std::memset(high(tile, column), 0xff, kBlocks);
    }
    ++used_;
    return tile;
  }

  void give(TileId tile) {
    std::memcpy(key(tile, 0), &free_, sizeof free_);
    free_ = tile;
    if (--used_ == 0) release();
  }

  uint8_t* key(TileId tile, uint32_t block) {
    return chunks_[tile / kChunkTiles] + (size_t(tile % kChunkTiles) * kBlocks + block) * kKeyBytes;
  }
  uint32_t* low(TileId tile, uint32_t column) {
    uint8_t* base = chunks_[tile / kChunkTiles] + kKeysOfChunk + size_t(column) * kBlocksOfChunk * sizeof(uint32_t);
    return reinterpret_cast<uint32_t*>(base) + size_t(tile % kChunkTiles) * kBlocks;
  }
  uint8_t* high(TileId tile, uint32_t column) {
    return chunks_[tile / kChunkTiles] + kKeysOfChunk + size_t(columns_) * kBlocksOfChunk * sizeof(uint32_t) +
           size_t(column) * kBlocksOfChunk + size_t(tile % kChunkTiles) * kBlocks;
  }

  uint64_t slot(TileId tile, uint32_t block, uint32_t column) {
    return low(tile, column)[block] | uint64_t(high(tile, column)[block]) << 32;
  }
  void set_slot(TileId tile, uint32_t block, uint32_t column, uint64_t slot) {
    low(tile, column)[block] = uint32_t(slot);
    high(tile, column)[block] = uint8_t(slot >> 32);
  }

  // Whether `b` lies right behind `a` in every array.
  static bool adjacent(TileId a, TileId b) { return b == a + 1 && b % kChunkTiles != 0; }

  uint32_t columns() const { return columns_; }
  uint32_t ever() const { return next_; }  // tiles numbered so far
  size_t memory_bytes() const { return chunks_.size() * chunk_bytes() + chunks_.capacity() * sizeof(void*); }

 private:
  friend class Check;
  static constexpr size_t kBlocksOfChunk = size_t(kChunkTiles) * kBlocks;
  static constexpr size_t kKeysOfChunk = kBlocksOfChunk * kKeyBytes;

  size_t chunk_bytes() const { return kKeysOfChunk + size_t(columns_) * kBlocksOfChunk * 5; }

  void add_chunk() {
    if (chunks_.size() == kNone / kChunkTiles) throw std::bad_alloc();  // numbers have 32 bits
    if (chunks_.size() == chunks_.capacity()) chunks_.reserve(2 * chunks_.size() + 8);
    void* memory = std::aligned_alloc(64, (chunk_bytes() + 63) / 64 * 64);
    if (memory == nullptr) throw std::bad_alloc();
    chunks_.push_back(static_cast<uint8_t*>(memory));
  }

  void release() {
    for (uint8_t* chunk : chunks_) std::free(chunk);
    chunks_.clear();
    chunks_.shrink_to_fit();
    next_ = 0;
    used_ = 0;
    free_ = kNone;
  }

  const uint32_t columns_;
  std::vector<uint8_t*> chunks_;
  uint32_t next_ = 0;
  uint32_t used_ = 0;
  TileId free_ = kNone;
};

}  // namespace flexkv::index
