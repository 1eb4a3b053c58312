"""The control process: stores, exports, guests, kernel readers, and what ties them together."""
