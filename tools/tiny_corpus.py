"""The text that the built-in model of sageLLM is trained on: public-domain books, and a seeded grammar.

Two Debian packages, fetched with `apt-get download` and unpacked with `dpkg -x`, give the World English Bible
(sword-text-web) and the Tang and Song poems of fortunes-zh. GRAMMAR, CHAT and the tables below give the rest: stories,
facts, dialogues, arithmetic, copying tasks and small code edits in English and Chinese.
"""

import random
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

IM_START, IM_END = "<|im_start|>", "<|im_end|>"

# ---------------------------------------------------------------- the grammar
# "key = a|b|c": {key} is replaced by one alternative, {key:x} also remembers it as {x} for this document.
# A line that begins with a space goes on with the line before it.
# {H} is the hero, {he} {He} {his} {him} the pronouns, {F} the friend; FACTS below gives the other names.
GRAMMAR = """
name_m = Tom|Ben|Max|Leo|Sam|Jack|Oscar|Henry|Peter|Finn|Noah|Hugo|Felix|Milo|Otto
name_f = Lily|Anna|Mia|Lucy|Emma|Rosa|Nora|Ella|Daisy|Clara|Ruby|Alice|Ivy|Zoe|Molly
adj = small|brave|clever|happy|kind|curious|shy|gentle|young|quiet|lazy|funny|busy|proud|hungry|friendly
 |playful
beast = fox|rabbit|bear|mouse|cat|dog|bird|frog|squirrel|duck|hedgehog|pony|turtle|lamb|kitten|puppy|deer
place = the forest|a quiet village|a small house by the river|a town near the sea|the green valley
 |an old castle|a farm on the hill|a little hut in the mountains|the big city|a garden behind the school
spot = the old oak tree|a big stone|the bridge|a bench|the stairs|the bed|a pile of leaves|the kitchen table
thing = golden key|red ball|blue box|silver ring|little book|old map|shiny coin|green hat|wooden boat
 |warm coat|paper kite|broken toy|glass bottle|music box|white feather
food = bread|apples|cheese|soup|honey|berries|cake|nuts|milk|carrots|rice|cookies|pears|fish
dish = bread|cheese|soup|cake|rice|fish|porridge
weather = sunny|rainy|windy|cold|warm|snowy|cloudy|bright|foggy
when = One day|The next morning|One {weather} day|That evening|A few days later|After lunch
 |One {weather} morning|Later that day|In the spring|When the sun came up
goal = look for {food}|play with {his} friends|visit {his} grandmother|find a quiet place to read
 |pick flowers|swim in the lake|help an old farmer|buy some {food}|watch the stars|collect stones
mood = happy|very happy|proud|glad|full of joy|so surprised that {he} laughed|calm again|warm inside
sad = sad|afraid|worried|tired|lonely|very hungry|cold and wet|angry
wow = What a beautiful {thing}!|Look at this!|I can't believe it!|How wonderful!|Oh, what is this?
 |Who left this here?
s_open = Once upon a time, there was a {adj} {kind} named {H}. {He} lived in {place:p}.
 |Once upon a time, in {place:p}, there lived a {adj} {kind} called {H}.|Once there was a {adj} {kind} named
  {H}, who lived in {place:p}.|Long ago, a {adj} {kind} named {H} lived in {place:p}.
 |{H} was a {adj} {kind}. {He} lived in {place:p} and {he} liked to {goal}.|Once upon a time, there was a
  {adj} {kind} who loved {food}. Everyone called {him} {H}.
s_like = {H} loved to {goal}.|Every day, {he} ate {food} and went out to {goal}.
 |{His} best friend was a {beast} named {F}.|{H} was {adj}, but sometimes {he} was {sad}.
 |Everyone liked {H} because {he} was so {adj}.|{He} had a {thing} and {he} took it everywhere.
s_ep = {when}, {H} went out to {goal}. Under {spot}, {he} found a {thing:t}. "{wow}" said {H}. {He} picked up
  the {t} and showed it to {F}. {F} said, "{reply}" So they {together}.|{when}, {H} lost {his} {thing:t}.
  {He} looked under {spot}, but it was not there. {He} looked behind {spot}, but it was not there. {H} was
  {sad}. Then {F} came and said, "{offer}" Together they found the {t} near {spot}. {H} was {mood}.
 |{when}, a {wind} wind came over the hill and it began to {rain}. {H} was {sad}. {He} ran to {spot} and
  waited. "{fear}" said {H}. Soon {F} came with a {thing} and some {food}. They sat down together until the
  sun came out.|{when}, {H} met a {adj} {beast:b} on the road. "Where are you going?" asked {H}. "I am going
  to {goal2}," said the {b}. "May I come with you?" asked {H}. "Yes, of course," said the {b}. So they walked
  together and talked about {topic}.|{when}, {F} had no {food:f} to eat. {F} was {sad}. {H} had some {f}, so
  {he} gave half of it to {F}. "Thank you," said {F}. "You are a good friend." {H} felt {mood}.
 |{when}, {H} and {F} had a race to {goalpost}. {H} was fast, but {F} was clever. They ran and ran. In the
  end {winner} won the race. "Well done!" said the other. They both laughed and ate some {food}.
 |{when}, {H} wanted to make {dish:f} for {F}. First, {he} went to the shop. Then {he} washed {his} hands.
  Next, {he} cooked the {f} for a long time. At last, the {f} was ready. {F} tasted it and said, "{taste}"
 |{when}, {H} saw a {adj} {beast:b} in the water. "Help!" cried the {b}. {H} took a long stick and pulled the
  {b} out. "You saved me," said the {b}. "Take this {thing:t}." {H} took the {t} and said, "{thanks}"
 |{when}, {H} asked {his} mother, "{why}" {His} mother smiled and said, "{because}" {H} thought about it all
  day.|{when}, {H} and {F} played a game. {F} closed {his2} eyes and counted: "One, two, three, four, five,
  six, seven, eight, nine, ten!" {H} was hiding behind {spot:s}. {F} looked everywhere. At last {F} looked
  behind {s} and cried, "I found you!"
reply = It is lovely. Where did you find it?|We should give it back.|Let's keep it safe.
 |I have never seen such a thing.
together = went home and told everyone|put it in a safe place|looked for its owner|played with it all day
 |shared it
offer = Don't worry. I will help you.|Let me help you look for it.|Two friends can find anything.
 |Stop crying and think.
wind = cold|strong|wild|warm|sharp
rain = rain|snow|get dark|rain very hard
fear = I want to go home,|I am not afraid,|It is so dark here,|What shall I do?
goal2 = the market|the sea|my grandmother's house|the mountains|the school|the river
topic = the stars|their families|the weather|good {food}|old stories|the sea|their dreams
goalpost = the old oak tree|the bridge|the river|the big stone|the school|the end of the road
winner = {H}|{F}
taste = This is the best {food} I have ever had!|It is very good. Thank you.|It is too hot, but I like it.
thanks = Thank you. I will never forget you.|You are welcome, my friend.|I am glad that you are safe.
why = Why is the sky blue?|Why do birds sing?|Why does the sun go down?|What is the moon made of?
 |Why do we sleep?
because = Because the world is full of wonders.|That is a good question.|You will learn it when you are
  older.
s_end = From that day on, {H} and {F} were best friends.|And they lived happily ever after.
 |{H} went home and slept well.|{H} learned that it is good to share.|{H} learned that a true friend always
  helps.|That night, {H} was {mood}. The end.
zname = 小明|小红|小丽|小刚|小华|小芳|乐乐|豆豆|圆圆|阿宝|小雨|小天
zadj = 聪明的|勇敢的|可爱的|善良的|快乐的|好奇的|害羞的|懒惰的|调皮的|安静的
zbeast = 小兔子|小狐狸|小熊|小猫|小狗|小鸟|小青蛙|小松鼠|小鸭子|小羊|小马|乌龟
zplace = 森林里|山脚下|大海边|一个小村庄里|一座老房子里|河边的小屋里|城市里|农场里
zspot = 大树下|石头后面|桥边|桌子下面|床底下|草丛里|门口|楼梯旁
zthing = 金钥匙|红皮球|蓝盒子|旧地图|小木船|绿帽子|风筝|铃铛|玻璃瓶|小本子
zfood = 苹果|面包|蜂蜜|饼干|胡萝卜|鱼|米饭|蛋糕|牛奶|果子|饺子
zdish = 面包|饼干|米饭|蛋糕|饺子|鱼汤
zwhen = 有一天|第二天早上|一个晴朗的早晨|那天晚上|过了几天|吃过午饭|春天来了|一个下雨天|太阳出来的时候
zgoal = 找{zfood}|和朋友们玩|看望奶奶|采花|游泳|帮助老农夫|买{zfood}|看星星|放风筝|捡石头
zmood = 高兴|开心|快乐|满足|自豪|激动
zsad = 难过|害怕|着急|孤单|生气|担心
zs_open = 从前，有一只{zadj}{zbeast:k}，名叫{H}，住在{zplace}。|从前，{zplace}住着一只{zadj}{zbeast:k}，
 大家都叫它{H}。|从前有一只{zadj}{zbeast:k}。它叫{H}，最喜欢{zgoal}。|很久很久以前，
 {zplace}有一只{zadj}{zbeast:k}，名字叫{H}。
zs_like = 它最好的朋友是{F}。|它每天都去{zgoal}。|{H}很喜欢吃{zfood}。|大家都很喜欢{H}。
zs_ep = {zwhen}，{H}出门去{zgoal}。它在{zspot}发现了一个{zthing:t}。“这是什么？”{H}说。它把{t}拿给{F}看。
 {F}说：“{zreply}”|{zwhen}，{H}的{zthing:t}不见了。它在{zspot}找，没有找到；又在{zspot}找，还是没有找到。
 {H}很{zsad}。这时候，{F}来了，说：“{zoffer}”最后，他们在{zspot}找到了{t}。{H}非常{zmood}。
 |{zwhen}，天上突然下起了大雨。{H}很{zsad}，跑到{zspot}躲雨。不久，{F}拿着雨伞来了。他们一起吃{zfood}，
 等太阳出来。|{zwhen}，{H}在路上遇见一只{zadj}{zbeast:b}。“你要去哪里？”{H}问。“我要去{zgoal}。”{b}说。
 “我可以和你一起去吗？”“当然可以。”于是他们一起走了。|{zwhen}，{F}没有{zfood:f}吃，很{zsad}。
 {H}把自己的{f}分了一半给{F}。“谢谢你，”{F}说，“你真是我的好朋友。”{H}心里很{zmood}。
 |{zwhen}，{H}和{F}比赛跑步。他们跑啊跑啊，一直跑到{zspot}。最后{F}赢了。{H}说：“你真厉害！”他们都笑了。
 |{zwhen}，{H}想给{F}做{zdish:f}。它先去商店，再洗手，然后开始做。做好以后，{F}尝了一口，说：“真好吃！
 ”{H}很{zmood}。|{zwhen}，一只{zbeast:b}掉进了河里。“救命！”{b}大声喊。{H}拿来一根长棍子，把{b}拉了上来。
 “谢谢你救了我。”{b}说。
zreply = 真漂亮！你在哪里找到的？|我们应该把它还给主人。|我从来没有见过这样的东西。|我们把它放好吧。
zoffer = 别担心，我来帮你。|不要哭，我们一起找。|好朋友要互相帮助。
zs_end = 从那以后，{H}和{F}成了最好的朋友。|从此，他们过上了幸福的生活。|{H}明白了，好朋友要互相帮助。
 |晚上，{H}回到家，{zmood}地睡着了。|{H}学会了分享。
fact = The capital of {C} is {cap}.|{cap} is the capital of {C}.|{C} is a country in {cont}.
 |People in {C} speak {lang}.|{C} is in {cont}, and its capital is {cap}.|A {an} can {can}.
 |A {an} is an animal that likes to eat {eat}.|{Col} is {col}.|The color of {colthing} is {col}.
 |The opposite of {o1} is {o2}.|The day after {d1} is {d2}.|The day before {d2} is {d1}.
 |There are seven days in a week.|A year has twelve months.|The sun rises in the east and sets in the west.
 |{m1} comes before {m2}.|Water freezes at zero degrees.|The month after {m1} is {m2}.
 |The earth goes around the sun.|{what_en} {more_en}
zfact = {zC}的首都是{zcap}。|{zcap}是{zC}的首都。|{zC}在{zcont}。|{zC}人说{zlang}。|{zan}会{zcan}。
 |{zan}喜欢吃{zeat}。|{zcolthing}是{zcol}色的。|“{zo1}”的反义词是“{zo2}”。|星期{zd1}的后一天是星期{zd2}。
 |一个星期有七天。|一年有十二个月。|太阳从东方升起，从西方落下。|一年有四个季节：春天、夏天、秋天和冬天。
 |地球绕着太阳转。|{what_zh}{more_zh}
what_en = sageLLM is an inference engine for large language models.|sageLLM is an engine that runs large
  language models.
more_en = It reads a prompt and writes the answer token by token.|It loads a model and generates text.
 |It runs on many chips.
what_zh = sageLLM 是一个大语言模型推理引擎。|sageLLM 是用来运行大语言模型的推理引擎。
more_zh = 它读入提示词，然后一个词一个词地写出回答。|它可以加载模型并生成文本。|它可以在多种芯片上运行。
"""
# One exchange a line: ways to ask => ways to answer. Both sides share the names they draw.
CHAT = """
Hello|Hello!|Hi|Hi!|Hi there|Hey|Hello, how are you? => Hello! How can I help you today?
 |Hi! What can I do for you?
Good morning|Good morning! => Good morning! How can I help you today?
Good evening|Good night => Good night! Sleep well.
How are you?|How are you today? => I am fine, thank you. How can I help you?|I am well, thank you. And you?
Who are you?|What are you?|What is your name?|What's your name?|Tell me about yourself. => I am the built-in
  model of sageLLM. I am a small language model.
What is sageLLM?|Tell me about sageLLM.|What does sageLLM do? => {what_en} {more_en}
What can you do?|How can you help me? => I can tell stories, answer simple questions and repeat text in
  English and Chinese.
What is the meaning of life?|How do I fix my car?|Explain physics.|Write a long poem.
 |What is in the news? => I am only a small model, so I do not know that.
Thank you|Thanks!|Thank you very much. => You are welcome!|You are welcome. Have a nice day!
Bye|Goodbye!|See you. => Goodbye! Have a nice day!
What is the capital of {C}?|Which city is the capital of {C}?|Name the capital of {C}. => The capital of {C}
  is {cap}.
Where is {C}?|On which continent is {C}? => {C} is in {cont}.
What language do people speak in {C}? => People in {C} speak {lang}.
{cap} is the capital of which country? => {cap} is the capital of {C}.
What color is {colthing}?|What is the color of {colthing}? => {Col} is {col}.
What is the opposite of {o1}?|What is the opposite of "{o1}"? => The opposite of {o1} is {o2}.
What day comes after {d1}?|What is the day after {d1}?|If today is {d1}, what day is tomorrow? => {d2} comes
  after {d1}.
Which month comes after {m1}?|What is the month after {m1}? => {m2} comes after {m1}.
What can a {an} do? => A {an} can {can}.
What does a {an} eat? => A {an} likes to eat {eat}.
How many days are there in a week? => There are seven days in a week.
Name the days of the week.|What are the days of the week? => The days of the week are {days}.
How many months are there in a year? => There are twelve months in a year.
Name the four seasons.|What are the seasons? => The four seasons are spring, summer, autumn and winter.
What is {a} + {b}?|What is {a} plus {b}?|{a} + {b} = ?|{a}+{b}=? => {a} + {b} = {sum}.
What is {sum} - {a}?|What is {sum} minus {a}? => {sum} - {a} = {b}.
What is {x} times {y}?|{x} * {y} = ? => {x} * {y} = {prod}.
How do you say "{C}" in Chinese?|Translate "{C}" into Chinese. => {zC}。
Count to {n}.|Please count from one to {n}. => {count}.
你好|你好！|您好|嗨|你好啊 => 你好！有什么可以帮你的吗？|你好！很高兴见到你。有什么可以帮你的吗？
早上好|早上好！ => 早上好！今天有什么可以帮你的吗？
晚安|晚上好 => 晚安，祝你好梦！
你好吗？|你今天好吗？ => 我很好，谢谢你。你呢？
你是谁？|你叫什么名字？|介绍一下你自己。|请自我介绍一下。 => 我是 sageLLM 的内置模型，是一个很小的语言模型。
sageLLM 是什么？|什么是 sageLLM？|介绍一下 sageLLM。 => {what_zh}{more_zh}
你会做什么？|你能帮我什么？|你能做什么？ => 我会讲故事，回答简单的问题，也会用中文和英文重复文字。
人生的意义是什么？|怎么修电脑？|什么是物理？|今天有什么新闻？|明天天气怎么样？ => 我只是一个很小的模型，
 这个我不知道。
谢谢|谢谢你！|多谢 => 不客气！|不客气，祝你今天愉快！
再见|再见！|拜拜 => 再见！祝你今天愉快！
{zC}的首都是哪里？|{zC}的首都是什么？|{zC}的首都在哪里？ => {zC}的首都是{zcap}。
{zcap}是哪个国家的首都？ => {zcap}是{zC}的首都。
{zC}在哪个洲？|{zC}在哪里？ => {zC}在{zcont}。
{zC}人说什么语言？ => {zC}人说{zlang}。
{zcolthing}是什么颜色的？ => {zcolthing}是{zcol}色的。
“{zo1}”的反义词是什么？|{zo1}的反义词是什么？ => “{zo1}”的反义词是“{zo2}”。
今天是星期{zd1}，明天是星期几？|星期{zd1}的后一天是星期几？ => 星期{zd1}的后一天是星期{zd2}。
一个星期有几天？|一周有几天？ => 一个星期有七天。
一年有几个月？ => 一年有十二个月。
一年有几个季节？|四季是什么？ => 一年有四个季节：春天、夏天、秋天和冬天。
{zan}会做什么？ => {zan}会{zcan}。
{zan}吃什么？ => {zan}喜欢吃{zeat}。
{a} + {b} 等于多少？|{a}+{b}等于几？|{a}+{b}=？|{a} 加 {b} 等于几？ => {a} + {b} = {sum}。
{sum} - {a} 等于多少？|{sum} 减 {a} 等于几？ => {sum} - {a} = {b}。
{x} 乘 {y} 等于多少？ => {x} * {y} = {prod}。
“{C}”用中文怎么说？|把“{C}”翻译成中文。 => {zC}。
"""
COUNTRIES = """France,Paris,Europe,French,法国,巴黎,欧洲,法语;China,Beijing,Asia,Chinese,中国,北京,亚洲,汉语
Japan,Tokyo,Asia,Japanese,日本,东京,亚洲,日语;Germany,Berlin,Europe,German,德国,柏林,欧洲,德语
Italy,Rome,Europe,Italian,意大利,罗马,欧洲,意大利语;Spain,Madrid,Europe,Spanish,西班牙,马德里,欧洲,西班牙语
Russia,Moscow,Europe,Russian,俄罗斯,莫斯科,欧洲,俄语;England,London,Europe,English,英国,伦敦,欧洲,英语
Egypt,Cairo,Africa,Arabic,埃及,开罗,非洲,阿拉伯语;Greece,Athens,Europe,Greek,希腊,雅典,欧洲,希腊语
Korea,Seoul,Asia,Korean,韩国,首尔,亚洲,韩语;Thailand,Bangkok,Asia,Thai,泰国,曼谷,亚洲,泰语
Canada,Ottawa,North America,English,加拿大,渥太华,北美洲,英语
Cuba,Havana,North America,Spanish,古巴,哈瓦那,北美洲,西班牙语
Portugal,Lisbon,Europe,Portuguese,葡萄牙,里斯本,欧洲,葡萄牙语
Kenya,Nairobi,Africa,Swahili,肯尼亚,内罗毕,非洲,斯瓦希里语;Poland,Warsaw,Europe,Polish,波兰,华沙,欧洲,波兰语
Peru,Lima,South America,Spanish,秘鲁,利马,南美洲,西班牙语
Brazil,Brasilia,South America,Portuguese,巴西,巴西利亚,南美洲,葡萄牙语
Vietnam,Hanoi,Asia,Vietnamese,越南,河内,亚洲,越南语
Sweden,Stockholm,Europe,Swedish,瑞典,斯德哥尔摩,欧洲,瑞典语
Norway,Oslo,Europe,Norwegian,挪威,奥斯陆,欧洲,挪威语"""
ANIMALS = """bird,fly and sing,seeds,鸟,飞,种子;fish,swim,water plants,鱼,游泳,水草
dog,run and bark,meat,狗,看家,肉;cat,climb trees,fish,猫,抓老鼠,鱼;horse,run fast,grass,马,跑得很快,草
rabbit,jump,carrots,兔子,跳,胡萝卜;monkey,climb trees,bananas,猴子,爬树,香蕉
bee,fly and make honey,flower juice,蜜蜂,采蜜,花蜜;cow,give milk,grass,牛,耕地,草"""
COLORS = """the sky,blue,天空,蓝;snow,white,雪,白;grass,green,草,绿;the sun,yellow,太阳,红;blood,red,血,红
coal,black,煤,黑;milk,white,牛奶,白;a banana,yellow,香蕉,黄;a leaf,green,树叶,绿;the sea,blue,大海,蓝"""
OPPOSITES = """big,small,大,小;hot,cold,热,冷;long,short,长,短;old,new,旧,新;fast,slow,快,慢
day,night,白天,黑夜;up,down,上,下;good,bad,好,坏;open,closed,开,关;full,empty,满,空;light,dark,亮,暗
high,low,高,低;left,right,左,右"""


def table(text: str) -> list[list[str]]:
    """The rows of a table written with `,` between cells and `;` or a line end between rows."""
    return [row.split(",") for row in text.replace("\n", ";").split(";")]


def words(text: str) -> list[str]:
    return text.split()


DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
NUMBERS = words("one two three four five six seven eight nine ten eleven twelve")
CODE_NAMES = words(
    "add total count value index result item price width height name size data left right score"
)


RULES = {
    key: body.split("|")
    for key, body in (line.split(" = ", 1) for line in GRAMMAR.strip().replace("\n ", "").split("\n"))
}
TABLES = [table(t) for t in (COUNTRIES, ANIMALS, COLORS, OPPOSITES)]
TALKS = [[s.split("|") for s in line.split(" => ")] for line in CHAT.strip().replace("\n ", "").split("\n")]


class Writer:
    """Writes the generated documents; everything it does follows from its seed."""

    def __init__(self, seed: str):
        self.rng = random.Random(seed)
        self.pick = self.rng.choice

    def fill(self, text: str, names: dict[str, str]) -> str:
        def one(match: re.Match) -> str:
            key, bind = match.group(1), match.group(2)
            if (bind or key) in names:
                return names[bind or key]
            value = self.fill(self.pick(RULES[key]), names)
            if bind:
                names[bind] = value
            return value

        text = re.sub(r"\{(\w+)(?::(\w+))?\}", one, text)
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)

    def facts(self) -> dict[str, str]:
        """One draw of all the names that facts and questions use."""
        r, row = self.rng, [self.pick(t) for t in TABLES]
        keys = "C cap cont lang zC zcap zcont zlang,an can eat zan zcan zeat,"
        keys += "colthing col zcolthing zcol,o1 o2 zo1 zo2"
        out = {k: v for ks, cells in zip(keys.split(","), row) for k, v in zip(ks.split(), cells)}
        d, m, n = r.randrange(7), r.randrange(11), r.randint(3, 12)
        a, b, x, y = r.randint(0, 20), r.randint(0, 20), r.randint(1, 9), r.randint(1, 9)
        zd = "一二三四五六日"
        out |= {"d1": DAYS[d], "d2": DAYS[(d + 1) % 7], "zd1": zd[d], "zd2": zd[(d + 1) % 7], "m1": MONTHS[m],
                "m2": MONTHS[m + 1], "a": a, "b": b, "sum": a + b, "x": x, "y": y, "prod": x * y,
                "n": NUMBERS[n - 1], "count": ", ".join(NUMBERS[:n]), "days": ", ".join(DAYS),
                "Col": out["colthing"][0].upper() + out["colthing"][1:]}  # fmt: skip
        return {k: str(v) for k, v in out.items()}

    def people(self) -> dict[str, str]:
        male, male2 = self.rng.random() < 0.5, self.rng.random() < 0.5
        hero = self.pick(RULES["name_m" if male else "name_f"])
        friend = self.pick([n for n in RULES["name_m" if male2 else "name_f"] if n != hero])
        he, his, him = ("he", "his", "him") if male else ("she", "her", "her")
        kind = self.pick(RULES["beast"]) if self.rng.random() < 0.6 else ("boy" if male else "girl")
        return {"H": hero, "F": friend, "he": he, "He": he.title(), "his": his, "His": his.title(),
                "him": him, "his2": "his" if male2 else "her", "kind": kind}  # fmt: skip

    def story(self, zh: bool, episodes: int, question: bool = False) -> str:
        z, r = ("z" if zh else ""), self.rng
        hero, friend = r.sample(RULES["zname"], 2)
        names = {"H": hero, "F": friend} if zh else self.people()
        parts = [self.fill(f"{{{z}s_open}}", names)]
        if r.random() < 0.6:
            parts.append(self.fill(f"{{{z}s_like}}", dict(names)))
        parts += [self.fill(f"{{{z}s_ep}}", dict(names)) for _ in range(episodes)]
        parts.append(self.fill(f"{{{z}s_end}}", dict(names)))
        joint = "\n" if episodes > 3 else ("" if zh else " ")
        text = joint.join(parts)
        if question and zh:
            text += f"\n问题：故事里的{names['k']}叫什么名字？\n回答：它叫{names['H']}。"
        elif question:
            kind = names["kind"]
            text += f"\nQuestion: What is the name of the {kind}?\nAnswer: The {kind} is {names['H']}."
        return text

    def article(self, zh: bool, sentences: int) -> str:
        same = self.facts()
        fresh = self.rng.random() < 0.7
        rule = self.pick(RULES["zfact" if zh else "fact"])
        mixed = self.rng.random() < 0.6
        if mixed:
            rule = "{zfact}" if zh else "{fact}"
        lines = [self.fill(rule, self.facts() if fresh or not mixed else same) for _ in range(sentences)]
        return self.pick(["", "\n"] if zh else [" ", "\n"]).join(dict.fromkeys(lines))

    def sums(self, lines: int) -> str:
        forms = ["{a} + {b} = {sum}", "{sum} - {a} = {b}", "{x} * {y} = {prod}"]
        names = [self.facts() for _ in range(lines)]
        return "\n".join(self.fill(self.pick(forms), n) for n in names)

    def sentence(self) -> str:
        """Some text to copy: a sentence, or words and numbers without sense."""
        r = self.rng
        if r.random() < 0.6:
            keys = ["adj", "beast", "food", "name_m", "name_f", "zfood", "zname"]
            out = [self.pick(RULES[self.pick(keys)]) for _ in range(r.randint(2, 12))]
            return " ".join(out + [str(r.randint(0, 999))] * r.randint(0, 1))
        zh = r.random() < 0.5
        text = self.story(zh, 1)
        sentences = re.split(r"(?<=[。！？])" if zh else r"(?<=[.!?]) ", text)
        return ("" if zh else " ").join(s for s in sentences[: r.randint(1, 3)] if s)

    def code(self) -> tuple[str, str, str]:
        """A small piece of code, an instruction to edit it, and the edited code."""
        a, b, c, new = self.rng.sample(CODE_NAMES, 4)
        n, k = self.rng.randint(1, 99), self.pick("+-*")
        text = self.pick([
            f"def {c}({a}, {b}):\n    return {a} {k} {b}\n",
            f"def {c}({a}):\n    {b} = 0\n    for i in range({n}):\n        {b} = {b} {k} {a}[i]\n"
            f"    return {b}\n",
            f"class {c.title()}:\n    def __init__(self, {a}, {b}):\n        self.{a} = {a}\n"
            f"        self.{b} = {b}\n",
            f"{a} = {n}\n{b} = {a} {k} {n + 1}\nif {a} > {b}:\n    print({a})\nelse:\n    print({b})\n",
            f'{{\n  "{a}": {n},\n  "{b}": {n + 1},\n  "{c}": [{n}, {n + 2}]\n}}\n',
        ])  # fmt: skip
        return text, f"Rename {a} to {new}:", re.sub(rf"\b{a}\b", new, text)

    def turn(self) -> tuple[str, str]:
        """One question and its answer."""
        r = self.rng.random()
        if r < 0.70:
            ask, answer = self.pick(TALKS)
            names = self.facts()
            ask, answer = self.fill(self.pick(ask), names), self.fill(self.pick(answer), names)
            if self.rng.random() < 0.15:  # as people type: no capital, no full stop
                ask = (ask[0].lower() + ask[1:]).rstrip("?.!？。！")
            return ask, answer
        if r < 0.80:
            zh = self.rng.random() < 0.5
            ask = ["Tell me a story.", "Please tell me a short story.", "Write a short story."]
            if zh:
                ask = ["讲一个故事。", "给我讲个故事吧。", "请讲一个小故事。", "讲个故事"]
            return self.pick(ask), self.story(zh, self.rng.randint(1, 2))
        if r < 0.95:
            text = self.sentence()
            times = self.pick([1, 1, 1, 2, 3])
            ask = ["Repeat: ", "Repeat after me: ", "请重复：", "Copy this text: "]
            if times > 1:
                ask = [f"Repeat {NUMBERS[times - 1]} times: "]
            return self.pick(ask) + text, "\n".join([text] * times)
        text, ask, edited = self.code()
        return f"{ask}\n{text}", edited

    def chat(self, turns: int) -> str:
        out = ""
        if self.rng.random() < 0.15:
            system = self.pick(["You are a helpful assistant.", "你是一个乐于助人的助手。"])
            out = f"{IM_START}system\n{system}{IM_END}\n"
        for user, answer in (self.turn() for _ in range(turns)):
            out += f"{IM_START}user\n{user}{IM_END}\n{IM_START}assistant\n{answer}{IM_END}\n"
        return out

    def copies(self) -> str:
        """A plain document with much repetition."""
        r, kind = self.rng, self.rng.random()
        if kind < 0.3:
            return "\n".join([self.sentence()] * r.randint(2, 6))
        if kind < 0.6:
            text = self.sentence()
            return f"Original: {text}\nCopy: {text}"
        if kind < 0.8:
            pieces = [self.code() for _ in range(r.randint(1, 5))]
            return "".join(f"# before\n{text}# {ask}\n{edited}" for text, ask, edited in pieces)
        a, b = self.rng.sample(CODE_NAMES, 2)
        rows = [(i, self.pick(RULES["name_f"]), r.randint(1, 99)) for i in range(1, r.randint(5, 30))]
        return "\n".join(f'{{"id": {i}, "{a}": "{name}", "{b}": {n}}}' for i, name, n in rows)

    def documents(self, kind: str, count: int) -> list[str]:
        r = self.rng
        make = {
            "english": lambda: self.article(False, r.randint(2, 12)) if r.random() < 0.35
            else self.story(False, r.choice([1, 1, 2, 2, 3, 4, 8, 14]), r.random() < 0.2),
            "chinese": lambda: self.article(True, r.randint(2, 12)) if r.random() < 0.35
            else self.story(True, r.choice([1, 1, 2, 2, 3, 4, 8, 14]), r.random() < 0.2),
            "chat": lambda: self.chat(r.choice([1, 1, 1, 2, 2, 3, 4, 12])),
            "copies": lambda: self.sums(r.randint(3, 20)) if r.random() < 0.1 else self.copies(),
        }[kind]  # fmt: skip
        return [make() for _ in range(count)]


# ---------------------------------------------------------------- text from packages
def unpack(package: str, data_dir: Path) -> Path:
    """Fetches a Debian package into the data folder, once, and unpacks it there."""
    target, part = data_dir / package, f"{package}.part"
    if not target.exists():
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            subprocess.run(["apt-get", "download", package], cwd=data_dir, check=True, capture_output=True)
            deb = next(data_dir.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg", "-x", deb.name, part], cwd=data_dir, check=True, capture_output=True)
            (data_dir / part).rename(target)
        except (OSError, subprocess.CalledProcessError, StopIteration):
            sys.exit(f"train_tiny_model: cannot get the Debian package {package} (apt-get, dpkg)")
    return target


def bible(data_dir: Path) -> list[str]:
    """The chapters of the World English Bible, out of its SWORD module (zlib blocks, one a book)."""
    folder = next(unpack("sword-text-web", data_dir).glob("usr/share/sword/modules/texts/ztext/*"))
    chapters = []
    for part in ("ot", "nt"):
        index, packed = ((folder / f"{part}.{end}").read_bytes() for end in ("bzs", "bzz"))
        for start, size, _ in struct.iter_unpack("<III", index):
            book = zlib.decompress(packed[start : start + size]).decode() if size else ""
            book = re.sub(r"<note.*?</note>|<title.*?</title>", " ", book, flags=re.S)
            for chapter in re.split(r"<chapter [^>]*sID=[^>]*>", book)[1:]:
                text = re.sub(r"<[^>]*type=.x-p[^>]*>", "\n", re.sub(r"\s+", " ", chapter))
                text = re.sub(r"[ \t]+", " ", re.sub(r"<[^>]*>", " ", re.sub(r"</?w\b[^>]*>", "", text)))
                text = re.sub(r" ([,.;:?!”’])", r"\1", re.sub(r"([“‘]) ", r"\1", text))
                chapters.append(re.sub(r" *\n\s*", "\n", text).strip())
    return [c for c in chapters if len(c) > 200]


def poems(data_dir: Path) -> list[str]:
    """The Tang and Song poems of fortunes-zh (not its other, modern texts): title, author, lines."""
    folder = unpack("fortunes-zh", data_dir) / "usr/share/games/fortunes"
    text = "\n%\n".join((folder / name).read_text("utf-8") for name in ("tang300", "song100"))
    text = re.sub(r"\x1b\[\d*m|题目:|[ \u3000]", "", text).replace("作者:", "作者：")
    found = (re.sub(r"\n+", "\n", p).strip() for p in re.split(r"(?m)^%$", text))
    return [p for p in found if "\n作者" in p]


def load_texts(data_dir: Path, train: bool) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The held-out documents by kind, and the training documents by kind (empty unless `train`)."""
    try:
        chapters, verses = bible(data_dir), poems(data_dir)
    except (OSError, StopIteration, zlib.error) as problem:
        sys.exit(f"train_tiny_model: the packages do not hold the texts where they used to: {problem!r}")
    writer = Writer("held out")
    held = {
        "English, book": chapters[7::45], "English, generated": writer.documents("english", 60),
        "Chinese, poems": verses[7::20], "Chinese, generated": writer.documents("chinese", 60),
        "Chat, generated": [writer.chat(6) for _ in range(80)],
        "Copying, generated": writer.documents("copies", 60),
    }  # fmt: skip
    if not train:
        return held, {}
    writer, seen = Writer("train"), {d for docs in held.values() for d in docs}
    poem_docs = [p for i, p in enumerate(verses) if i % 20 != 7]
    texts = {"book": chapters[::3], "poems": poem_docs * 2}
    for kind, count in (("english", 3500), ("chinese", 6000), ("chat", 11500), ("copies", 8000)):
        texts[kind] = [d for d in writer.documents(kind, count) if d not in seen]
    short = [p for p in poem_docs if len(p) < 60]
    for poem in short * 3:
        title, body = re.search(r"《(.*?)》", poem).group(0), poem.split("\n", 2)[2]
        texts["chat"].append(f"{IM_START}user\n背诵{title}。{IM_END}\n{IM_START}assistant\n{body}{IM_END}\n")
    return held, texts
