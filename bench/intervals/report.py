def text(r, t):
    return ""
