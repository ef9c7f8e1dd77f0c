// Caller errors become std::invalid_argument (ValueError in Python), with the condition and the way out in the text.
#pragma once

#include <stdexcept>
#include <string>

#define AMPO_CHECK(condition, message)                                                        \
  do {                                                                                        \
    if (!(condition)) throw std::invalid_argument(std::string(message) + " [" #condition "]"); \
  } while (0)
