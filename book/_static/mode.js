/* The theme reports an error when a first-time reader has no stored mode; the default is the system's. */
document.documentElement.dataset.mode ||= "auto";
document.documentElement.dataset.theme ||= matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
