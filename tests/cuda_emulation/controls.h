// What the tests ask of the emulation.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <string>

struct FakeGraph;

namespace emulation {

// Of threads and of blocks: 0 forward, 1 reverse, else a random one by that seed.
void set_order(unsigned order);

// Memory that ends at a page nobody may touch, and begins behind one; `bytes` are rounded up to `align`.
void* allocate_guarded(std::size_t bytes, std::size_t align);
void free_guarded(void* at);

// A node of a graph that calls a function.
void add_host_node(FakeGraph* graph, const std::function<void()>& function);

// From now on the call of that number (from 1) fails; 0: none does.
void fail_call(int number);
void set_devices(int count);                // 0: none, which is an error; negative: none, and no error
void set_device(int device);                // this thread's current one
int device();
int calls();                                // since fail_call
bool failed();                              // whether that call was made
std::map<std::string, int> launches();      // since the last time, by kernel: "graph NAME" or NAME
std::map<std::string, int> live_objects();  // created and not destroyed
int pending();                              // pieces of work that nobody has waited for

}  // namespace emulation
