#if defined(__aarch64__)
#endif
typedef int tq_translation_unit_is_not_empty;
