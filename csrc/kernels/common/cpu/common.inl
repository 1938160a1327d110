// What every body is written with.
#pragma once

#include "crew.inl"
#include "dtype.inl"
#include "elements.inl"
#include "math.inl"
#include "numbers.inl"
#include "planning.inl"
#include "threads.inl"
#include "vec.h"
