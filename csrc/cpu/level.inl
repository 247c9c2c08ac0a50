// All kernels for one instruction-set level, compiled with the macros that the including file defines.
#include "gram.inl"
#include "rectangle.inl"

namespace tclr {

#define TCLR_JOIN_(a, b) a##b
#define TCLR_JOIN(a, b) TCLR_JOIN_(a, b)
#define TCLR_NAME_(a) #a
#define TCLR_NAME(a) TCLR_NAME_(a)

const Level TCLR_JOIN(TCLR_LEVEL, _level) = {
    TCLR_NAME(TCLR_LEVEL),
    {workspace<float>, forward<float>, backward<float>, local_local<float>, largest<float>, rectangle_workspace<float>,
     rectangle<float>, labelled_terms<float>},
    {workspace<double>, forward<double>, backward<double>, local_local<double>, largest<double>,
     rectangle_workspace<double>, rectangle<double>, labelled_terms<double>},
};

}  // namespace tclr
