// Which of what is compiled for several instruction sets serves.
#pragma once

#include <string>
#include <vector>

namespace beagle::cpu {

// The instruction sets compiled for that this machine has, from the least to the best, which serves.
std::vector<std::string> instruction_sets();

// Lets another of them serve, as tests do: no other thread may be calling what is compiled for them. Throws
// std::invalid_argument for a name that is none of them.
void use_instruction_set(const std::string& name);

}  // namespace beagle::cpu
