// No instruction set beyond the compiler's default.
#define TCLR_LEVEL portable
#ifndef TCLR_VECTOR_BYTES
#define TCLR_VECTOR_BYTES 16
#endif
#ifndef TCLR_TILE_ROWS
#define TCLR_TILE_ROWS 6
#endif
#include "level.inl"
