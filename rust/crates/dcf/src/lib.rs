//! DCF: the 17-byte header, message types, codecs and chunks.
