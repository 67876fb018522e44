"""Faster R-CNN as pure functions on arrays of fixed shapes (Ren et al. 2015; Sec. 4.3 and the appendix of the paper).

Boxes are float32 [..., 4]: x1, y1, x2, y2 in pixels of the image that the network sees, the last pixel included.
"""
