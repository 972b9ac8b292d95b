// Light, dark, or as the system has it.

function themeEvents() {
  const themes = ["auto", "light", "dark"], button = at("theme"), dark = window.matchMedia("(prefers-color-scheme: dark)");
  let theme = "auto";
  const apply = () => {
    document.documentElement.dataset.theme = theme === "auto" ? (dark.matches ? "dark" : "light") : theme;
    button.textContent = `Theme: ${theme}`;
  };
  button.addEventListener("click", () => { theme = themes[(themes.indexOf(theme) + 1) % themes.length]; apply(); });
  dark.addEventListener("change", apply);
  apply();
}
